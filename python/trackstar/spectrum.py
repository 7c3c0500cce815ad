"""What R_train is like, block by block: how much of it rows decide, and how much damping or a single row does."""

import dataclasses

import torch
from rich.console import Console
from rich.table import Table

from trackstar.curvature import Curvature
from trackstar.progress import track
from trackstar.storage.store import Store

PRESENT = 1e-6
"""An eigenvalue below this part of a block's largest is the rounding of float32 products."""

PIECE = 64 << 20
"""Float32 bytes of the rows that are looked at together."""


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """R_train's blocks, each value (L,) float64.

    Attributes:
        size: d.
        rank: eigenvalues of R without its damping above :data:`PRESENT` of the largest one.
        stable_rank: ‖R‖_F² / ‖R‖₂², of R without its damping: how many directions carry it.
        trace: of R without its damping, the mean of ‖x‖² over the rows it was made of.
        condition: largest eigenvalue / smallest, with the damping.
        largest_share: the longest row's part of Σ ‖x‖² over the store's rows.
    """

    size: int
    rank: torch.Tensor
    stable_rank: torch.Tensor
    trace: torch.Tensor
    condition: torch.Tensor
    largest_share: torch.Tensor


def spectrum_of(store: Store) -> Spectrum:
    """The spectrum of a store's R_train, and the weight of its longest rows; reads all rows.

    Raises:
        StoreError: the store is incomplete or damaged.
    """
    store.require_complete()
    curvature = store.curvature
    bare = (curvature.eigenvalues - curvature.damping[:, None]).clamp_min(0)
    top = bare.amax(1)
    return Spectrum(
        size=bare.shape[1],
        rank=(bare > PRESENT * top[:, None]).sum(1).double(),
        stable_rank=bare.square().sum(1) / top.square(),
        trace=bare.sum(1),
        condition=curvature.eigenvalues.amax(1) / curvature.eigenvalues.amin(1),
        largest_share=_largest_shares(store, curvature),
    )


def _largest_shares(store: Store, curvature: Curvature) -> torch.Tensor:
    # x = B⁻¹ y = R Bᵀ y, because BᵀB = R⁻¹.
    back = (curvature.train @ curvature.whitener.double().mT).float()
    blocks, size = store.row_shape
    total, largest = (torch.zeros(blocks, dtype=torch.float64) for _ in range(2))
    rows = max(1, PIECE // (4 * blocks * size))
    with track("reading rows", store.end, passing=True) as advance:
        for start in range(0, store.end, rows):
            stop = min(start + rows, store.end)
            whitened = store.rows(start, stop)
            for b in range(blocks):
                squares = (whitened[:, b] @ back[b].T).square().sum(1)
                total[b] += squares.sum()
                largest[b] = torch.maximum(largest[b], squares.max())
            advance(stop - start)
    return largest / total.clamp_min(1e-300)


def print_spectrum(spectrum: Spectrum, console: Console | None = None) -> None:
    """Print each quantity's smallest, median and largest value over the blocks, with the blocks they are of."""
    console = Console(highlight=False) if console is None else console
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"R_train, {len(spectrum.rank)} blocks of {spectrum.size}")
    for name in ("smallest", "median", "largest"):
        table.add_column(name, justify="right")
    for name, values, style in (
        ("rank", spectrum.rank, ".0f"),
        ("stable rank", spectrum.stable_rank, ".1f"),
        ("trace", spectrum.trace, ".3g"),
        ("condition, damped", spectrum.condition, ".3g"),
        ("longest row's share of the trace", spectrum.largest_share, ".1%"),
    ):
        ends = [f"{values[b]:{style}} (block {b})" for b in (int(values.argmin()), int(values.argmax()))]
        table.add_row(name, ends[0], f"{values.median():{style}}", ends[1])
    console.print(table)
