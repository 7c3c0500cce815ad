"""Ground truth: how much an answer loses when the model is trained again without its k best passages."""

import dataclasses
import os
import sys

import numpy as np
import torch
from trackstar.evaluation.metrics import estimate

from experiments.retraining import Run, answers_of, by_kind, kept_runs
from experiments.scores import ranking
from experiments.small_model import Setup, make_texts
from experiments.small_scores import small_scores
from experiments.study import study

METHODS = ("TrackStar", "EK-FAC", "BM25", "random")

K = 20

COUNTS = {"small": (3, 1), "medium": (8, 1), "full": (40, 3)}
"""Questions of either kind, and seeds of training, by the size of the study."""


def main(argv: list[str] | None = None) -> int:
    """Train without each question's best passages, and compare with training on all."""
    here = study(__doc__, argv)
    torch.set_num_threads(1)
    setup = Setup()
    texts = make_texts(setup)
    questions, seeds = COUNTS[here.name]
    seen = np.array(texts.seen)
    asked = [*np.flatnonzero(seen)[:questions].tolist(), *np.flatnonzero(~seen)[:questions].tolist()]
    found = small_scores(here, texts, setup)
    every = tuple(range(setup.passages))
    best = {name: best_of(found[name], K) for name in METHODS}
    runs = [
        Run(without(every, chosen), seed)
        for seed in range(seeds)
        for chosen in [(), *(best[name][q] for name in METHODS for q in asked)]
    ]
    answers = answers_of(kept_runs(here), texts, setup, runs, os.cpu_count() or 1)
    answers = answers.reshape(seeds, len(runs) // seeds, setup.queries)
    falls = {
        name: np.array(
            [
                (answers[:, 0, q] - answers[:, 1 + number * len(asked) + i, q]).mean()
                for i, q in enumerate(asked)
            ]
        )
        for number, name in enumerate(METHODS)
    }
    groups = by_kind(seen[asked])
    results = [
        {
            "method": name,
            "queries": group,
            "n": int(members.sum()),
            "fall of log p": dataclasses.asdict(estimate(fall[members])),
            "above random's": dataclasses.asdict(estimate((fall - falls["random"])[members])),
            "above BM25's": dataclasses.asdict(estimate((fall - falls["BM25"])[members])),
        }
        for name, fall in falls.items()
        for group, members in groups.items()
    ]
    here.write("removal", results, k=K, seeds=seeds, setup=dataclasses.asdict(setup))
    return 0


def best_of(scores: torch.Tensor, k: int) -> list[tuple[int, ...]]:
    """Each query's k passages of the highest (Q, N) scores, ties to the smaller position."""
    positions = ranking(scores, [str(i) for i in range(scores.shape[1])])
    return [tuple(int(i) for i in row[:k]) for row in positions]


def without(every: tuple[int, ...], removed: tuple[int, ...]) -> tuple[int, ...]:
    """The positions that are left."""
    return tuple(i for i in every if i not in set(removed))


if __name__ == "__main__":
    sys.exit(main())
