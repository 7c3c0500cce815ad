"""Checks of arguments that the ops share."""

from collections.abc import Sequence

import torch

from trackstar_kernels._checks import (
    check_count,
    check_dtype,
    check_flag,
    check_same_device,
    check_shape,
    check_tensor,
)
from trackstar_kernels._codes import DTYPES, NARROW, code_size


def check_finite(queries: torch.Tensor) -> None:
    """Require finite queries."""
    if queries.is_meta:
        raise ValueError("queries must hold numbers, got a meta tensor")
    # The extremes pass on NaN, and unlike isfinite() they take no memory.
    if not torch.stack(queries.aminmax()).isfinite().all():
        raise ValueError("queries must be finite, got NaN or infinity")


def check_task(queries: torch.Tensor, mixing: float) -> None:
    """Check what makes a task."""
    check_shape("queries", check_tensor("queries", queries), ("Q", "L", "d"))
    check_dtype("queries", queries, torch.float32)
    if queries.numel() == 0:
        raise ValueError(f"queries must not be empty, got shape {tuple(queries.shape)}")
    if isinstance(mixing, bool) or not isinstance(mixing, (int, float)):
        raise TypeError(f"mixing must be a float, got {type(mixing).__name__}")
    if not 0 <= mixing < 1:
        raise ValueError(f"mixing must be at least 0 and less than 1, got {mixing}")


def check_mixed_rows(
    queries: torch.Tensor,
    rows: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    start: int,
) -> None:
    """Check what a task is asked of."""
    N = check_rows(queries, rows, k, scales, start)
    check_shape("squared_norms", check_tensor("squared_norms", squared_norms), (N, rows.shape[1]))
    check_dtype("squared_norms", squared_norms, torch.float32)
    check_same_device(queries=queries, squared_norms=squared_norms)


def check_rows(
    queries: torch.Tensor, rows: torch.Tensor, k: int, scales: torch.Tensor | None, start: int
) -> int:
    """Check what all ops share; returns N."""
    check_shape("queries", check_tensor("queries", queries), ("Q", "D"), ("Q", "L", "d"))
    check_dtype("queries", queries, torch.float32)
    check_dtype("rows", check_tensor("rows", rows), torch.bfloat16, *DTYPES.values())
    check_shape("rows", rows, ("N", *queries.shape[1:-1], code_size(queries.shape[-1], rows.dtype)))
    N = len(rows)
    if min(*queries.shape, *rows.shape) == 0:
        raise ValueError(
            f"queries and rows must not be empty, got shapes {tuple(queries.shape)} and {tuple(rows.shape)}"
        )
    if scales is not None:
        per_block = [(N, rows.shape[1])] if queries.dim() == 3 else []
        check_shape("scales", check_tensor("scales", scales), (N,), *per_block)
        check_dtype("scales", scales, torch.float32)
    check_same_device(queries=queries, rows=rows, scales=scales)
    check_start(start, N)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 1 <= k <= N:
        raise ValueError(f"k must be from 1 to N (={N}), got {k}")
    return N


def check_start(start: int, N: int) -> None:
    """Require a first index that leaves room for N of them."""
    check_count("start", start, 0, 2**63 - 1 - N)


def check_ends(ends: tuple[bool, ...]) -> None:
    """Require at least one end of the order."""
    if not isinstance(ends, tuple) or not ends:
        raise TypeError(f"ends must be a tuple of at least one bool, got {ends!r}")
    for end in ends:
        check_flag("ends", end)


def check_places(places: torch.Tensor, wider: torch.Tensor) -> None:
    """Require positions (N,) of some of the wider rows."""
    check_dtype("places", check_tensor("places", places), torch.int64)
    check_shape("places", places, ("N",))
    check_same_device(wider=wider, places=places)
    if len(places) and not 0 <= places.min() <= places.max() < len(wider):
        raise ValueError(
            f"places must be from 0 to {len(wider) - 1} (the wider rows), "
            f"got {places.min().item()} to {places.max().item()}"
        )


def check_reached(reached: Sequence[torch.Tensor | None], ends: tuple[bool, ...], Q: int) -> None:
    """Require for each end scores (Q,) float32 or None."""
    if not isinstance(reached, (tuple, list)) or len(reached) != len(ends):
        raise ValueError(
            f"reached must hold scores or None for each of the {len(ends)} ends, got {reached!r}"
        )
    for scores in reached:
        if scores is not None:
            check_shape("reached", check_tensor("reached", scores), (Q,))
            check_dtype("reached", scores, torch.float32)


def check_wider(
    queries: torch.Tensor,
    codes: torch.Tensor,
    wider: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    scales: torch.Tensor,
    start: int,
) -> None:
    """Check narrow codes and the wider rows beside them, under queries (Q, L, d)."""
    check_narrow(queries, codes, squared_norms, scales)
    check_mixed_rows(queries, codes, squared_norms, k, scales, start)
    check_shape("wider", check_tensor("wider", wider), (len(codes), *queries.shape[1:]))
    check_dtype("wider", wider, torch.float16, torch.float32)
    check_same_device(queries=queries, wider=wider)


def check_narrow(
    queries: torch.Tensor, codes: torch.Tensor, squared_norms: torch.Tensor, scales: torch.Tensor
) -> None:
    """Require codes with scales of each block, under queries (Q, L, d)."""
    check_shape("queries", check_tensor("queries", queries), ("Q", "L", "d"))
    check_dtype("queries", queries, torch.float32)
    check_dtype("codes", check_tensor("codes", codes), *NARROW)
    check_shape("codes", codes, ("N", queries.shape[1], code_size(queries.shape[2], codes.dtype)))
    for name, tensor in (("scales", scales), ("squared_norms", squared_norms)):
        check_shape(name, check_tensor(name, tensor), (len(codes), queries.shape[1]))
        check_dtype(name, tensor, torch.float32)
    check_same_device(queries=queries, codes=codes, scales=scales, squared_norms=squared_norms)
