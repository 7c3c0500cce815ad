"""Exact top-k over stored rows: plain inner products, and TrackStar's task-mixed scores."""

from collections.abc import Callable

import torch

from trackstar_kernels._checks import check_count, check_dtype, check_same_device, check_shape, check_tensor
from trackstar_kernels._codes import DTYPES, NARROW, code_size
from trackstar_kernels._dispatch import implementation, register
from trackstar_kernels.scoring._merge import merge_topk
from trackstar_kernels.scoring._staging import staged

__all__ = ["Task", "merge_topk", "mixed_topk", "prepare_task", "score_topk", "staged"]

BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")}
register("score_topk", BACKENDS)
register("mixed_topk", BACKENDS)

Found = tuple[torch.Tensor, torch.Tensor]
"""Scores (Q, k) and indices (Q, k)."""

Run = Callable[..., list[Found]]
"""What a backend's ``prepare_task`` returns: see :func:`_prepare`."""


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
    whatever the other queries and rows, their number and the number of threads, so results of shards
    merge (:func:`merge_topk`) into exactly the result of the whole.

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
    N = _check_inputs(queries, rows, k, scales, start)
    if scales is not None and scales.dim() == 1:
        scales = scales[:, None]
    if queries.dim() == 2:
        queries, rows = queries[:, None], rows[:, None]
    elif rows.dtype not in NARROW and (scales is None or scales.shape[1] == 1):
        queries, rows = queries.reshape(len(queries), 1, -1), rows.reshape(N, 1, -1)
    with torch.no_grad():
        return _score_topk(queries, rows, k, scales, largest, start, backend)


@torch.library.custom_op("trackstar::score_topk", mutates_args=())
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
    _check_finite(queries)
    run = implementation(__name__, "score_topk", queries.device, backend)
    return run(queries, rows, k, scales, largest, start)


@_score_topk.register_fake
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
    _check_task(queries, mixing)
    _check_mixed_rows(queries, rows, squared_norms, k, scales, start)
    if scales is not None and scales.dim() == 1:
        scales = scales[:, None]
    with torch.no_grad():
        return _mixed_topk(queries, rows, squared_norms, k, float(mixing), scales, largest, start, backend)


@torch.library.custom_op("trackstar::mixed_topk", mutates_args=())
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
    (found,) = _prepare(queries, mixing, backend)(rows, squared_norms, k, scales, (largest,), start)
    return found


@_mixed_topk.register_fake
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


def prepare_task(
    queries: torch.Tensor, mixing: float, *, asked: range | None = None, backend: str | None = None
) -> "Task":
    """What :func:`mixed_topk` has to compute of its queries alone, once for any number of calls.

    Args:
        queries: (Q, L, d) float32, finite, whitened. Not to be changed while the task is in use.
        mixing: λ, 0 ≤ λ < 1.
        asked: positions of the queries that are scored, consecutive; None for all. The others shape R_task alike, so
            that batches of a task's queries have the scores that they have together.
        backend: None, "cpu", "cuda" or "reference".

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: the shape, mixing, asked or the backend is wrong, or queries are not finite.
    """
    _check_task(queries, mixing)
    asked = range(len(queries)) if asked is None else asked
    if not (0 <= asked.start < asked.stop <= len(queries) and asked.step == 1):
        raise ValueError(f"asked must be a range within 0 to {len(queries)} (the queries), got {asked}")
    with torch.no_grad():
        return Task(queries, _prepare(queries, float(mixing), backend, slice(asked.start, asked.stop)))


class Task:
    """Queries and their Hessian, ready to score the shards of a store one after another: see :func:`prepare_task`."""

    def __init__(self, queries: torch.Tensor, run: Run) -> None:
        """Not to be called from outside: ``run`` is what a backend's ``prepare_task`` returned."""
        self._queries = queries
        self._run = run

    def topk(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        *,
        scales: torch.Tensor | None = None,
        largest: bool = True,
        start: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What :func:`mixed_topk` returns for the task's queries and λ, bit for bit; same arguments, same errors."""
        (found,) = self._scan(rows, squared_norms, k, scales, (largest,), start)
        return found

    def extremes(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        *,
        scales: torch.Tensor | None = None,
        start: int = 0,
    ) -> tuple[Found, Found]:
        """What :meth:`topk` returns for ``largest`` True and False, bit for bit, on the CPU from one scan."""
        highest, lowest = self._scan(rows, squared_norms, k, scales, (True, False), start)
        return highest, lowest

    def _scan(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        ends: tuple[bool, ...],
        start: int,
    ) -> list[Found]:
        _check_mixed_rows(self._queries, rows, squared_norms, k, scales, start)
        if scales is not None and scales.dim() == 1:
            scales = scales[:, None]
        with torch.no_grad():
            return self._run(rows, squared_norms, k, scales, ends, start)


def _prepare(queries: torch.Tensor, mixing: float, backend: str | None, asked: slice = slice(None)) -> Run:
    """The task as a function of (rows, squared_norms, k, scales, ends, start).

    ``ends`` holds True for the largest scores, False for the smallest; the function returns a result for each.
    """
    _check_finite(queries)
    prepare = implementation(__name__, "mixed_topk", queries.device, backend, function="prepare_task")
    return prepare(queries, mixing, asked)


def _empty_result(queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


def _check_finite(queries: torch.Tensor) -> None:
    # Part by part: what isfinite() takes in between is more than the queries themselves.
    if not all(part.isfinite().all() for part in queries.split(64)):
        raise ValueError("queries must be finite, got NaN or infinity")


def _check_task(queries: torch.Tensor, mixing: float) -> None:
    check_shape("queries", check_tensor("queries", queries), ("Q", "L", "d"))
    check_dtype("queries", queries, torch.float32)
    if queries.numel() == 0:
        raise ValueError(f"queries must not be empty, got shape {tuple(queries.shape)}")
    if isinstance(mixing, bool) or not isinstance(mixing, (int, float)):
        raise TypeError(f"mixing must be a float, got {type(mixing).__name__}")
    if not 0 <= mixing < 1:
        raise ValueError(f"mixing must be at least 0 and less than 1, got {mixing}")


def _check_mixed_rows(
    queries: torch.Tensor,
    rows: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    start: int,
) -> None:
    N = _check_inputs(queries, rows, k, scales, start)
    check_shape("squared_norms", check_tensor("squared_norms", squared_norms), (N, rows.shape[1]))
    check_dtype("squared_norms", squared_norms, torch.float32)
    check_same_device(queries=queries, squared_norms=squared_norms)


def _check_inputs(
    queries: torch.Tensor, rows: torch.Tensor, k: int, scales: torch.Tensor | None, start: int
) -> int:
    """Check what the two ops share; returns N."""
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
    check_count("start", start, 0)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 1 <= k <= N:
        raise ValueError(f"k must be from 1 to N (={N}), got {k}")
    return N
