"""Ground truth: how much an answer loses when the model is trained again without its k best passages."""

import dataclasses
import sys

import numpy as np
import torch
from trackstar.evaluation.metrics import estimate

from experiments.retraining import Run, answers_of
from experiments.scores import ranking
from experiments.small_model import Setup, make_texts
from experiments.small_scores import small_scores
from experiments.study import study

METHODS = ("TrackStar", "cosine", "EK-FAC", "BM25", "random")

K = 20

COUNTS = {"small": (3, 1), "medium": (6, 1), "full": (40, 3)}
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
    found = small_scores(here.path("small-ekfac"), texts, setup, here.seed)
    every = tuple(range(setup.passages))
    best = {name: best_of(found[name], K) for name in METHODS}
    runs = [
        Run(without(every, chosen), seed)
        for seed in range(seeds)
        for chosen in [(), *(best[name][q] for name in METHODS for q in asked)]
    ]
    answers = answers_of(here.folder.parent / "retrained", texts, setup, runs).reshape(seeds, -1, len(seen))
    results = []
    for number, name in enumerate(METHODS):
        start = 1 + number * len(asked)
        drops = np.array([(answers[:, 0, q] - answers[:, start + i, q]).mean() for i, q in enumerate(asked)])
        for group, chosen in (("training passages", seen[asked]), ("passages held out", ~seen[asked])):
            fall = dataclasses.asdict(estimate(drops[chosen]))
            results.append({"method": name, "about": group, "n": int(chosen.sum()), "fall of log p": fall})
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
