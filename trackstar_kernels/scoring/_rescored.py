"""Narrow rows beside a wider copy of them: exact answers. Without one: how far scores may be off."""

import torch

from trackstar_kernels._checks import (
    check_backend,
    check_dtype,
    check_flag,
    check_same_device,
    check_shape,
    check_tensor,
)
from trackstar_kernels._dispatch import implementation
from trackstar_kernels.scoring._arguments import (
    check_finite,
    check_narrow,
    check_start,
    check_task,
    check_wider,
)
from trackstar_kernels.scoring._bounds import mixed_bounds, product_bounds
from trackstar_kernels.scoring._task import prepare_task

Rescored = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Scores (Q, k), indices (Q, k), and the number (Q,) of wider rows scored."""


def rescored_topk(
    queries: torch.Tensor,
    codes: torch.Tensor,
    wider: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    *,
    scales: torch.Tensor,
    largest: bool = True,
    start: int = 0,
    backend: str | None = None,
) -> Rescored:
    """What :func:`score_topk` finds among wider rows, most of which their narrow codes rule out.

    Every row is scored from its codes, with a bound of how far that may be from the wider row's score; rows that
    might be among the k best are scored again. The answer is exact. How many rows that takes depends on how much
    narrowing loses: few of int8's, nearly all of sign's.

    Args:
        queries: (Q, L, d) float32, finite.
        codes: (N, L, …) int8, int4 or sign codes as :func:`encode_rows` makes them, on which the bounds rest.
        wider: (N, L, d) float16 or float32, the rows that were encoded, or these rounded to float16.
        squared_norms: (N, L) float32, as :func:`encode_rows` returned them.
        k: results per query, 1 ≤ k ≤ N.
        scales: (N, L) float32, those of the codes.
        largest: False returns the k smallest scores instead.
        start: index of the first row, added to all indices.
        backend: None, "cpu" or "reference", which scores all wider rows.

    Returns:
        scores (Q, k) float32 and indices (Q, k) int64: on the CPU, bit for bit those of :func:`score_topk` called with
        ``wider`` and one query at a time. And (Q,) int64, how many wider rows were scored for each query, which
        depends on the number of threads.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, k, start or the backend is wrong, or queries are not finite.
    """
    check_wider(queries, codes, wider, squared_norms, k, scales, start)
    check_finite(queries)
    check_flag("largest", largest)
    check_backend(backend)
    run = implementation("trackstar_kernels.scoring", "rescored_topk", queries.device, backend)
    with torch.no_grad():
        found: Rescored = run(queries, codes, wider, squared_norms, k, scales, largest, start)
    return found


def rescored_mixed_topk(
    queries: torch.Tensor,
    codes: torch.Tensor,
    wider: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    mixing: float,
    *,
    scales: torch.Tensor,
    largest: bool = True,
    start: int = 0,
    backend: str | None = None,
) -> Rescored:
    """What :func:`mixed_topk` finds among wider rows, most of which their narrow codes rule out.

    Args:
        queries: (Q, L, d) float32, finite, whitened.
        codes: (N, L, …) int8, int4 or sign codes as :func:`encode_rows` makes them, on which the bounds rest.
        wider: (N, L, d) float16 or float32, the rows that were encoded, or these rounded to float16.
        squared_norms: (N, L) float32, as :func:`encode_rows` returned them.
        k: results per query, 1 ≤ k ≤ N.
        mixing: λ, 0 ≤ λ < 1.
        scales: (N, L) float32, those of the codes.
        largest: False returns the k smallest scores instead.
        start: index of the first row, added to all indices.
        backend: None or one of :func:`mixed_topk`. Others than "cpu" score all wider rows.

    Returns:
        scores (Q, k) float32 and indices (Q, k) int64: on the CPU, bit for bit those of :func:`mixed_topk` with
        ``wider``. And (Q,) int64, how many wider rows were scored for each query: those that any query needed.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, k, mixing, start or the backend is wrong, or queries are not finite.
    """
    check_flag("largest", largest)
    task = prepare_task(queries, mixing, backend=backend)
    return task.rescored_topk(codes, wider, squared_norms, k, scales=scales, largest=largest, start=start)


def score_bounds(
    queries: torch.Tensor,
    codes: torch.Tensor,
    squared_norms: torch.Tensor,
    indices: torch.Tensor,
    *,
    scales: torch.Tensor,
    mixing: float | None = None,
    start: int = 0,
) -> torch.Tensor:
    """How far the scores that narrow rows have may be from those of the rows that were encoded.

    Args:
        queries: (Q, L, d) float32, finite.
        codes: (N, L, …) int8, int4 or sign codes as :func:`encode_rows` makes them.
        squared_norms: (N, L) float32, as :func:`encode_rows` returned them.
        indices: (Q, k) int64, of the rows to look at, such as :func:`score_topk` returns.
        scales: (N, L) float32, those of the codes.
        mixing: None for the scores of :func:`score_topk`, λ for those of :func:`mixed_topk`.
        start: index of the first row.

    Returns:
        (Q, k) float32: the rows' own scores are at most so much larger or smaller. Scores of :func:`mixed_topk` are
        cosines, so that 2 says nothing.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape or mixing is wrong, queries are not finite, or an index is not that of a row.
    """
    check_narrow(queries, codes, squared_norms, scales)
    check_finite(queries)
    check_start(start, len(codes))
    check_dtype("indices", check_tensor("indices", indices), torch.int64)
    check_shape("indices", indices, (len(queries), "k"))
    check_same_device(
        queries=queries, codes=codes, squared_norms=squared_norms, indices=indices, scales=scales
    )
    positions = indices - start
    if positions.numel() and not 0 <= positions.min() <= positions.max() < len(codes):
        raise ValueError(f"indices must be from {start} to {start + len(codes) - 1}, got {indices.tolist()}")
    if mixing is not None:
        check_task(queries, mixing)
    rows, places = positions.unique(return_inverse=True)
    with torch.no_grad():
        arrays = codes[rows], squared_norms[rows], scales[rows]
        bounds = (
            product_bounds(queries, *arrays) if mixing is None else mixed_bounds(queries, mixing, *arrays)
        )
        return bounds.gather(1, places).float()
