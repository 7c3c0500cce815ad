"""Whether a model's own numerics move rows: the same example alone, padded, packed and among others."""

from collections.abc import Sequence

import torch

from trackstar.gradients.collector import GradientCollector
from trackstar.gradients.examples import Encoded
from trackstar.gradients.heap import give_back_free_pages
from trackstar.gradients.lean import Batch, LeanPass
from trackstar.gradients.passes import has_loss

TOLERANCE = 1e-3
"""Share of a row's length that may move without a word; float32 moves about 1e-6 of it."""

TOKENS = 32
"""Tokens of each example that is looked at."""


def check_numerics(lean: LeanPass, examples: Sequence[Encoded], collector: GradientCollector) -> str | None:
    """What to warn of before a build, or None: how far rows move that ought not to.

    A row is a function of its example, but narrow weights round differently in every shape of batch, some attention
    kernels depend on padding, and experts of limited capacity on the other tokens. Looks at the beginnings of three
    examples (short, middling and long): each alone, and as a build runs them: padded, packed, and in another batch.

    Args:
        lean: passes of the model.
        examples: the corpus.
        collector: what collects its rows.

    Returns:
        A line with the largest ‖row − row alone‖ / ‖row alone‖ of each way, if any is above :data:`TOLERANCE`.
    """
    counted = sorted((e for e in (example.beginning(TOKENS) for example in examples) if has_loss(e)), key=len)
    if not counted:
        return None
    chosen = [counted[i * (len(counted) - 1) // 2] for i in range(3)]
    with lean:
        alone = torch.cat([_rows(lean, lean.arrange([e], packed=False), collector) for e in chosen])
        moved = {}
        for way, possible, packed in (
            ("padded", lean.can_pad, False),
            ("packed", lean.can_pack(chosen), True),
        ):
            if possible:
                together = _rows(lean, lean.arrange(chosen, packed=packed), collector)
                moved[way] = _distance(together, alone)
                other = _rows(lean, lean.arrange(chosen[:0:-1], packed=packed), collector)
                moved["in another batch"] = _distance(other, alone[1:].flip(0))
    give_back_free_pages()
    if not any(distance > TOLERANCE for distance in moved.values()):
        return None
    dtype = str(next(lean.model.parameters()).dtype).removeprefix("torch.")
    told = ", ".join(f"{way} {distance:.1e}" for way, distance in moved.items())
    return (
        f"this model's own numerics ({dtype}) move rows, by these shares of their length beside the example run alone: "
        f"{told}; float32 weights usually move them by 1e-06"
    )


def _rows(lean: LeanPass, batch: Batch, collector: GradientCollector) -> torch.Tensor:
    collector.offsets, collector.shape = batch.offsets, batch.shape
    with collector:
        lean.run(batch)
    # A row that is not finite is the build's to report, which names it.
    return (collector.rows if collector.not_finite() is None else torch.zeros(len(batch.lengths), 1)).flatten(
        1
    )


def _distance(rows: torch.Tensor, alone: torch.Tensor) -> float:
    if rows.shape != alone.shape:
        return 0.0
    return (
        ((rows - alone).norm(dim=1) / alone.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny))
        .max()
        .item()
    )
