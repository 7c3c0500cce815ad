"""Gradients of queries with one target, several, or one rather than another.

A query's function of the model is f = softmin_a f_a − softmin_o f_o over its targets a and what was not said o, where
softmin f = −log Σ exp(−f), and f_a is the output function of one target, summed over its tokens. For the loss f_a is
−log p(a), and f the negative log-probability that one of the targets is said, or its log-odds against the others. Its
gradient is a weighted sum: w_a = softmax(−f)_a, and −softmax(−f)_o.
"""

from collections.abc import Sequence

import torch

from trackstar.gradients.collector import GradientCollector
from trackstar.gradients.examples import IGNORED, Encoded, EncodedQuery
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.losses import LOSSES, VALUES
from trackstar.gradients.passes import BATCH_TOKENS, rows_of


def rows_of_queries(
    lean: LeanPass, queries: Sequence[EncodedQuery], collector: GradientCollector, output: str
) -> torch.Tensor:
    """Rows (Q, L, d) float32 on the CPU, in the order of ``queries``.

    Args:
        lean: passes of the model.
        queries: what was asked.
        collector: of the model.
        output: name of the output function.

    Raises:
        FloatingPointError: a query's gradient is NaN or Inf.
    """
    sequences = [sequence for query in queries for sequence in query.sequences]
    rows = rows_of(lean, sequences, collector, loss=LOSSES[output])
    if len(sequences) == len(queries):
        return rows
    found, start = torch.empty(len(queries), *rows.shape[1:]), 0
    for weights, out in zip(sequence_weights(lean, queries, output), found, strict=True):
        torch.tensordot(weights.float(), rows[start : start + len(weights)], 1, out=out)
        start += len(weights)
    return found


def sequence_weights(lean: LeanPass, queries: Sequence[EncodedQuery], output: str) -> list[torch.Tensor]:
    """Weight (n,) float64 of each of a query's n sequences in its gradient.

    Only targets that share a side with others are run, forward.
    """
    sides = [
        side
        for query in queries
        for side in ((query, *query.alternatives), query.rather_than)
        if len(side) > 1
    ]
    values = iter(_values(lean, [sequence for side in sides for sequence in side], output).tolist())

    def shares(side: Sequence[Encoded]) -> torch.Tensor:
        of_side = [next(values) for _ in side] if len(side) > 1 else [0.0] * len(side)
        return torch.softmax(-torch.tensor(of_side, dtype=torch.float64), 0)

    return [
        torch.cat([shares((query, *query.alternatives)), -shares(query.rather_than)]) for query in queries
    ]


def _values(lean: LeanPass, sequences: Sequence[Encoded], output: str) -> torch.Tensor:
    """The output function of each sequence, (n,) float64."""
    found = torch.empty(len(sequences), dtype=torch.float64)
    with lean:
        for members in lean.batches([len(sequence) for sequence in sequences], BATCH_TOKENS):
            batch = [sequences[i] for i in members]
            counts = [int((sequence.labels[1:] != IGNORED).sum()) for sequence in batch]
            parts = lean.values(lean.arrange(batch), VALUES[output]).cpu().double().split(counts)
            found[members] = torch.stack([part.sum() for part in parts])
    return found
