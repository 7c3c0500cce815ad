"""Tail-patch: one step of the saved optimizer on each proponent, and how much likelier that makes the answer.

Two yardsticks stand beside the methods: passages drawn at random, and the passages that state the fact (gold).
"""

import dataclasses
import os
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from trackstar.evaluation.metrics import estimate
from trackstar.evaluation.tail_patch import tail_patch

from experiments import corpus
from experiments.ladder import TRACKSTAR, scored
from experiments.provenance import checkpoint, load_model, optimizer_file, questions
from experiments.scores import ranking
from experiments.study import study

METHODS = (TRACKSTAR, "V, R, norm", "cosine", "dot", "BM25", "embeddings")

TOP = (1, 3, 5, 10)

QUESTIONS = {"small": 8, "medium": 30, "full": 200}
"""By the size of the study, evenly spread over those that are asked."""

CLIP = 1.0
"""As in fine-tuning."""


def main(argv: list[str] | None = None) -> int:
    """Step on the proponents of every method, each from the fine-tuned model as it is."""
    here = study(__doc__, argv)
    passages, _ = corpus.load(here)
    asked = questions(here)
    ids = [passage["id"] for passage in passages]
    lists = {name: ranking(scored(here, name), ids) for name in METHODS}
    lists["random"] = [random.Random(f"{here.seed}/{q['id']}").sample(ids, max(TOP)) for q in asked]
    lists["gold"] = [list(question["gold"]) for question in asked]
    count = min(QUESTIONS[here.name], len(asked))
    chosen = [i * len(asked) // count for i in range(count)]
    model, tokenizer = load_model(checkpoint(here))
    texts = {passage["id"]: passage for passage in passages}
    names = {method: [rows[i][: max(TOP)] for i in chosen] for method, rows in lists.items()}
    results = []
    for method, rows in names.items():
        patch = tail_patch(
            model,
            optimizer_file(here),
            [asked[i] for i in chosen],
            [[texts[name] for name in row] for row in rows],
            tokenizer=tokenizer,
            clip=CLIP,
            processes=os.cpu_count() or 1,
            keep=here.path("tail-patch.jsonl"),
        )
        results += gains_of(method, patch.gains, [len(row) for row in rows])
    idle = patch.idle.exp() - patch.before.exp()
    results.append({"method": "no passage", "k": 0, "gain": dataclasses.asdict(estimate(idle.numpy()))})
    here.write("tail_patch", results, questions=count, clip=CLIP)
    return 0


def gains_of(method: str, gains: torch.Tensor, counts: Sequence[int]) -> list[Mapping[str, Any]]:
    """The mean change in probability over the first k (fewer, where a question has fewer), for every k there is."""
    most = max(counts)
    return [
        {
            "method": method,
            "k": k,
            "gain": dataclasses.asdict(estimate(gains[:, :k].nanmean(1).numpy())),
        }
        for k in sorted({min(k, most) for k in TOP})
    ]


if __name__ == "__main__":
    sys.exit(main())
