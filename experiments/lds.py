"""Ground truth: linear datamodeling scores on a small model trained again on random halves of its corpus.

A method predicts what a model trained on a subset makes of an answer by the sum of its scores over the subset. The
score is Spearman's correlation, over subsets, of this sum with the answer's real log-probability, averaged over seeds
of training. Seeds disagree, which no prediction can help: the ceiling is what a perfect one would reach.

With --peers, bergson's methods are among them: an environment of several GB is made for it where there is none.
"""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import torch
from trackstar.evaluation.metrics import estimate

from benchmarks.peers_environment import ENVIRONMENT
from experiments.retraining import Run, answers_of, by_kind, half_subsets, kept_runs
from experiments.small_model import Setup, make_texts
from experiments.small_peers import bergson_scores
from experiments.small_scores import small_scores
from experiments.study import chosen, parser

COUNTS = {"small": (16, 2), "medium": (64, 2), "full": (200, 3)}
"""Subsets, and seeds of training, by the size of the study."""


def main(argv: list[str] | None = None) -> int:
    """Train again on every subset, and hold every method's sums against the outcome."""
    options = parser(__doc__)
    options.add_argument(
        "--peers",
        type=Path,
        nargs="?",
        const=ENVIRONMENT,
        metavar="ENVIRONMENT",
        help=f"bergson too, in a virtual environment of its own (default: {ENVIRONMENT})",
    )
    given = options.parse_args(argv)
    here = chosen(given)
    torch.set_num_threads(1)
    setup = Setup()
    texts = make_texts(setup)
    subsets, seeds = COUNTS[here.name]
    halves = half_subsets(subsets, setup.passages, here.seed)
    runs = [Run(half, seed) for seed in range(seeds) for half in halves]
    measured = answers_of(kept_runs(here), texts, setup, runs, os.cpu_count() or 1)
    measured = measured.reshape(seeds, subsets, setup.queries)
    inside = np.zeros((subsets, setup.passages))
    for row, half in zip(inside, halves, strict=True):
        row[list(half)] = 1
    found = small_scores(here, texts, setup) | bergson_scores(here, texts, setup, given.peers)
    by_query = {
        name: datamodeling_scores(values.double().numpy(), inside, measured.mean(0))
        for name, values in found.items()
    }
    by_query["ceiling"] = ceiling(measured)
    groups = by_kind(np.array(texts.seen))
    results = [
        {
            "method": name,
            "queries": group,
            "n": int(members.sum()),
            "LDS": dataclasses.asdict(estimate(values[members])),
            "above TrackStar's": dataclasses.asdict(estimate((values - by_query["TrackStar"])[members])),
        }
        for name, values in by_query.items()
        for group, members in groups.items()
    ]
    here.write("lds", results, subsets=subsets, seeds=seeds, setup=dataclasses.asdict(setup))
    return 0


def datamodeling_scores(scores: np.ndarray, inside: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """(Q,) Spearman's correlation of predicted with measured answers, over subsets.

    Args:
        scores: (Q, N) of each passage for each query: larger, the likelier it makes the answer.
        inside: (S, N), 1 where a subset has the passage, else 0.
        measured: (S, Q) log-probability of each query's target after training on each subset.

    Source: Park et al., TRAK, arXiv 2303.14186, section 2.
    """
    return spearman((inside @ scores.T).T, measured.T)


def spearman(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(Q,) rank correlation of the rows of two (Q, S); 0 where a row is constant."""
    a, b = (ranks(rows) - (rows.shape[1] - 1) / 2 for rows in (left, right))
    norms = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.where(norms > 0, (a * b).sum(1) / np.maximum(norms, 1e-300), 0.0)


def ranks(rows: np.ndarray) -> np.ndarray:
    """Ranks of each row's entries from 0, equal ones their mean rank."""
    below = (rows[:, None, :] < rows[:, :, None]).sum(2)
    equal = (rows[:, None, :] == rows[:, :, None]).sum(2)
    return below + (equal - 1) / 2


def ceiling(measured: np.ndarray) -> np.ndarray:
    """(Q,) the correlation that a perfect prediction would have with the mean over seeds of (seeds, S, Q) answers.

    With r the mean correlation of two seeds, the mean of n has reliability n r / (1 + (n − 1) r) (Spearman–Brown), and
    correlates with what all seeds have in common by its square root.
    """
    n = len(measured)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    r = np.mean([spearman(measured[i].T, measured[j].T) for i, j in pairs], axis=0).clip(0, 1)
    return np.sqrt(n * r / (1 + (n - 1) * r))


if __name__ == "__main__":
    sys.exit(main())
