"""Exact top-k over stored rows: plain inner products, and TrackStar's task-mixed scores."""

import torch

from trackstar_kernels._checks import check_backend, check_flag
from trackstar_kernels._codes import NARROW
from trackstar_kernels._custom_ops import custom_op
from trackstar_kernels._dispatch import implementation, register
from trackstar_kernels.scoring._arguments import check_finite, check_mixed_rows, check_rows, check_task
from trackstar_kernels.scoring._merge import merge_topk
from trackstar_kernels.scoring._rescored import rescored_mixed_topk, rescored_topk, score_bounds
from trackstar_kernels.scoring._staging import staged
from trackstar_kernels.scoring._task import Task, prepare, prepare_task

__all__ = [
    "Task",
    "merge_topk",
    "mixed_topk",
    "prepare_task",
    "rescored_mixed_topk",
    "rescored_topk",
    "score_bounds",
    "score_topk",
    "staged",
]

BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")}
register("score_topk", BACKENDS)
register("mixed_topk", BACKENDS)
register("rescored_topk", {"cpu": ("cpu", "reference"), "cuda": ("reference",)})


def score_topk(
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    *,
    scales: torch.Tensor | None = None,
    largest: bool = True,
    start: int = 0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows with the largest inner product for each query, exactly.

    score[q, n] = Σ_b scales[n, b] · ⟨queries[q, b], rows[n, b]⟩

    Scores are accumulated in float32 and never stored as a Q × N matrix. On the CPU a score has the same bits
    whatever the other rows and the number of threads, so results of shards merge (:func:`merge_topk`) into exactly
    the result of the whole; and whatever the other queries, as long as there are none, up to three, up to seven, or
    more.

    Args:
        queries: (Q, D) or (Q, L, d) float32, finite.
        rows: (N, D) or (N, L, d) float32, float16 or bfloat16, or int8, int4 or sign codes of
            :func:`encode_rows`, whose dtype (int8, uint8, int32) tells them apart. Rows that are not dense are
            copied.
        k: results per query, 1 ≤ k ≤ N.
        scales: multipliers of each row, (N,) float32, or of each row and block, (N, L) float32 with queries of
            shape (Q, L, d). What codes stand for is their scales times the codes.
        largest: False returns the k smallest scores instead.
        start: index of the first row, added to all indices.
        backend: None, "cpu", "cuda" or "reference".

    Returns:
        scores (Q, k) float32, best first, and indices (Q, k) int64. Equal scores are ordered by index. NaN
        scores, from rows or scales that hold NaN, come after every number.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, k, start or the backend is wrong, or queries are not finite.
    """
    N = check_rows(queries, rows, k, scales, start)
    check_flag("largest", largest)
    check_backend(backend)
    if scales is not None and scales.dim() == 1:
        scales = scales[:, None]
    if queries.dim() == 2:
        queries, rows = queries[:, None], rows[:, None]
    elif rows.dtype not in NARROW and (scales is None or scales.shape[1] == 1):
        queries, rows = queries.reshape(len(queries), 1, -1), rows.reshape(N, 1, -1)
    with torch.no_grad():
        return _score_topk(queries, rows, k, scales, largest, start, backend)


@custom_op("score_topk")
def _score_topk(
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`score_topk` on (Q, L, d) and (N, L, d), once shapes and dtypes are known to fit."""
    check_finite(queries)
    run = implementation(__name__, "score_topk", queries.device, backend)
    return run(queries, rows, k, scales, largest, start)


@torch.library.register_fake("trackstar::score_topk")
def _(
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_result(queries, k)


def mixed_topk(
    queries: torch.Tensor,
    rows: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    mixing: float,
    *,
    scales: torch.Tensor | None = None,
    largest: bool = True,
    start: int = 0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows with the largest TrackStar score for each query, under this task's own Hessian.

    score[q, n] = Σ_b x_qᵀ R_b⁻¹ y_n / √(Σ_b x_qᵀ R_b⁻¹ x_q · Σ_b y_nᵀ R_b⁻¹ y_n)

    with x the queries, y the rows and R_b = λ · mean over the queries of x xᵀ + (1 − λ) · I: in coordinates
    whitened by the training rows' own second moment, the mixture of the task's and the training set's. The
    score is a cosine, in [−1, 1]; a query or row of zeros scores 0. What narrowing took from a row, ‖y‖² − ‖ŷ‖²
    of which the squared norms know, counts in its norm as orthogonal to the queries. See this folder's README.md
    for how one scan does it.

    Args:
        queries: (Q, L, d) float32, finite, whitened.
        rows: (N, L, d) float32 or float16, or codes as in :func:`score_topk`; whitened.
        squared_norms: (N, L) float32, squared norm of each row's blocks, as kept by the store: before narrowing.
        k: results per query, 1 ≤ k ≤ N.
        mixing: λ, 0 ≤ λ < 1.
        scales: multipliers of the rows, (N,) or (N, L) float32, as in :func:`score_topk`.
        largest: False returns the k smallest scores instead.
        start: index of the first row, added to all indices.
        backend: None, "cpu", "cuda" or "reference".

    Returns:
        scores (Q, k) float32, within 1e-5 of the exact ones, and indices (Q, k) int64, ordered as in
        :func:`score_topk`.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, k, mixing, start or the backend is wrong, or queries are not finite.

    Source: TrackStar, arXiv 2410.17413, section 3 (task-specific Hessian).
    """
    check_task(queries, mixing)
    check_mixed_rows(queries, rows, squared_norms, k, scales, start)
    check_flag("largest", largest)
    check_backend(backend)
    if scales is not None and scales.dim() == 1:
        scales = scales[:, None]
    with torch.no_grad():
        return _mixed_topk(queries, rows, squared_norms, k, float(mixing), scales, largest, start, backend)


@custom_op("mixed_topk")
def _mixed_topk(
    queries: torch.Tensor,
    rows: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    mixing: float,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`mixed_topk`, once shapes and dtypes are known to fit."""
    (found,) = prepare(queries, mixing, backend).scan(rows, squared_norms, k, scales, (largest,), start)
    return found


@torch.library.register_fake("trackstar::mixed_topk")
def _(
    queries: torch.Tensor,
    rows: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    mixing: float,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_result(queries, k)


def _empty_result(queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)
