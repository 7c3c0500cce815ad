"""Tail-patch: one step of the saved optimizer on each proponent, and how much likelier that makes the answer.

Two yardsticks stand beside the methods: passages drawn at random, and the passages that state the fact (gold). A step
of Adam also goes on along the saved momentum, the same way whatever the passage: "no passage" is what that alone does.

In results/tail_patch.json: ``gains``, for each method and k the mean change of the answer's probability, how far it is
above no passage's, and how far TrackStar's is above it, question by question; ``agreement``, the rank correlation of a
method's scores with the changes, over the passages that were tried for a question; ``gold``, passages that state their
question's fact, with score and rank by TrackStar and the change: of these questions, and of those whose gold TrackStar
scores lowest, as if it spoke against the answer.
"""

import dataclasses
import os
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from trackstar.evaluation.metrics import estimate
from trackstar.evaluation.tail_patch import TailPatch, tail_patch

from experiments import corpus
from experiments.ladder import TRACKSTAR, scored
from experiments.lds import spearman
from experiments.provenance import checkpoint, load_model, optimizer_file, questions
from experiments.scores import ranking
from experiments.study import Study, chosen, parser

METHODS = (TRACKSTAR, "V, R, norm", "EK-FAC", "cosine", "dot", "BM25", "embeddings")

TOP = (1, 3, 5, 10)

QUESTIONS = {"small": 5, "medium": 20, "full": 40}
"""Whose proponents are stepped on, by the size of the study."""

OPPONENTS = {"small": 12, "medium": 20, "full": 40}
"""Questions whose gold TrackStar scores lowest, by the size of the study."""

CLIP = 1.0
"""As in fine-tuning."""

Question = dict[str, Any]

Changes = Mapping[str, float]
"""By passage: p of an answer after a step on it, less p before."""


def main(argv: list[str] | None = None) -> int:
    """Step on the proponents of some questions by every method, and on the gold that looks like an opponent."""
    options = parser(__doc__)
    options.add_argument("--questions", type=int, metavar="N", help="step on the proponents of N questions")
    given = options.parse_args(argv)
    here = chosen(given)
    passages, _ = corpus.load(here)
    asked = questions(here)
    ids = [passage["id"] for passage in passages]
    scores = {
        method: [dict(zip(ids, row, strict=True)) for row in scored(here, method).tolist()]
        for method in METHODS
    }
    lists = proponents(here, asked, ids)
    places = drawn(here, len(asked), given.questions or QUESTIONS[here.name])
    tried = {q: list(dict.fromkeys(name for rows in lists.values() for name in rows[q])) for q in places}
    for q in lowest_gold(asked, scores[TRACKSTAR])[: OPPONENTS[here.name]]:
        tried.setdefault(q, asked[q]["gold"])
    patch = steps(here, [asked[q] for q in tried], passages, list(tried.values()))
    changes = [
        dict(zip(names, row, strict=False))  # Rows are as long as the longest.
        for names, row in zip(tried.values(), patch.gains.tolist(), strict=True)
    ]
    idle = (patch.idle.exp() - patch.before.exp()).tolist()
    first = len(places)
    results = {
        "gains": gains(
            {method: [rows[q] for q in places] for method, rows in lists.items()},
            changes[:first],
            idle[:first],
        ),
        "agreement": [
            {"method": method, "rank correlation": agreement([of[q] for q in places], changes[:first])}
            for method, of in scores.items()
        ],
        "gold": gold_passages(
            [asked[q] for q in tried], [scores[TRACKSTAR][q] for q in tried], changes, patch
        ),
    }
    here.write("tail_patch", results, questions=len(places), clip=CLIP)
    return 0


def proponents(here: Study, asked: Sequence[Question], ids: list[str]) -> dict[str, list[list[str]]]:
    """By method and yardstick, for each question, the passages whose steps count, best first."""
    lists = {method: [row[: max(TOP)] for row in ranking(scored(here, method), ids)] for method in METHODS}
    lists["random"] = [random.Random(f"{here.seed}/{q['id']}").sample(ids, max(TOP)) for q in asked]
    lists["gold"] = [question["gold"] for question in asked]
    return lists


def lowest_gold(asked: Sequence[Question], scores: Sequence[Mapping[str, float]]) -> list[int]:
    """The questions' positions in order of the best score that a gold passage of theirs has, lowest first."""
    best = [max(of[name] for name in question["gold"]) for question, of in zip(asked, scores, strict=True)]
    return sorted(range(len(asked)), key=best.__getitem__)


def drawn(here: Study, among: int, count: int) -> list[int]:
    """``count`` of ``among`` positions at random, all where there are fewer; of a larger count these are the first."""
    return random.Random(here.seed).sample(range(among), among)[:count]


def steps(
    here: Study, asked: Sequence[Question], passages: Sequence[corpus.Passage], tried: Sequence[Sequence[str]]
) -> TailPatch:
    """A step on each of the passages named, for each question."""
    texts = {passage["id"]: passage for passage in passages}
    model, tokenizer = load_model(checkpoint(here))
    return tail_patch(
        model,
        optimizer_file(here),
        asked,
        [[texts[name] for name in names] for names in tried],
        tokenizer=tokenizer,
        clip=CLIP,
        processes=os.cpu_count() or 1,
        keep=here.path("tail-patch.jsonl"),
    )


def gains(
    lists: Mapping[str, Sequence[Sequence[str]]], changes: Sequence[Changes], idle: Sequence[float]
) -> list[dict[str, Any]]:
    """The change of an answer's probability over the first k passages, for every method and k, as estimates.

    Args:
        lists: of each method, each question's passages, best first; fewer than k where it has no more.
        changes: of each question.
        idle: change by no passage, of each question.
    """
    found = []
    for method, rows in lists.items():
        for k in sorted({min(k, max(map(len, rows))) for k in TOP}):
            mean, best = (means(some, changes, k) for some in (rows, lists[TRACKSTAR]))
            found.append(
                {
                    "method": method,
                    "k": k,
                    "change": dataclasses.asdict(estimate(mean)),
                    "above no passage": dataclasses.asdict(estimate(mean - np.array(idle))),
                    "TrackStar above it": dataclasses.asdict(estimate(best - mean)),
                }
            )
    return [*found, {"method": "no passage", "k": 0, "change": dataclasses.asdict(estimate(np.array(idle)))}]


def means(rows: Sequence[Sequence[str]], changes: Sequence[Changes], k: int) -> np.ndarray:
    """(Q,) float64: each question's mean change over its first k passages, or those that it has."""
    return np.array([np.mean([of[name] for name in row[:k]]) for row, of in zip(rows, changes, strict=True)])


def agreement(scores: Sequence[Mapping[str, float]], changes: Sequence[Changes]) -> dict[str, float]:
    """Spearman's correlation of scores and changes over a question's passages, averaged over questions."""
    return dataclasses.asdict(
        estimate(
            np.array(
                [
                    spearman(np.array([[found[name] for name in of]]), np.array([list(of.values())]))[0]
                    for found, of in zip(scores, changes, strict=True)
                ]
            )
        )
    )


def gold_passages(
    asked: Sequence[Question],
    scores: Sequence[Mapping[str, float]],
    changes: Sequence[Changes],
    patch: TailPatch,
) -> list[dict[str, Any]]:
    """What a step on each passage that states a fact does, beside its score: lowest scores first."""
    before, idle = patch.before.exp().tolist(), patch.idle.exp().tolist()
    found = [
        {
            "prompt": question["prompt"],
            "target": question["target"],
            "passage": name,
            "score": scores[q][name],
            "rank": 1 + sum(score > scores[q][name] for score in scores[q].values()),
            "probability": before[q],
            "change": changes[q][name],
            "change by no passage": idle[q] - before[q],
        }
        for q, question in enumerate(asked)
        for name in question["gold"]
    ]
    return sorted(found, key=lambda row: row["score"])


if __name__ == "__main__":
    sys.exit(main())
