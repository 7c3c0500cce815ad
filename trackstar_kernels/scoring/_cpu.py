"""score_topk in C++ (csrc/scoring.h), and mixed_topk in batched matrix products around it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trackstar_kernels import _C
from trackstar_kernels.scoring._reference import dequantize

SCRATCH = 64 * 2**20  # bytes of working memory, beside the factors, which are no larger than the queries


def score_topk(
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`trackstar_kernels.score_topk`; queries (Q, L, d), rows (N, L, d), scales (N, L) or None."""
    Q, N, (L, d) = len(queries), len(rows), rows.shape[1:]
    queries = queries.contiguous()
    if rows[0].is_contiguous():
        row_stride = rows.stride(0)
    else:
        rows, row_stride = rows.contiguous(), L * d
    scales = None if scales is None else scales.contiguous()
    scores = torch.empty(Q, k)
    indices = torch.empty(Q, k, dtype=torch.int64)
    _C.score_topk(
        queries=queries.data_ptr(),
        rows=rows.data_ptr(),
        row_type=str(rows.dtype).removeprefix("torch."),
        row_stride=row_stride,
        scales=0 if scales is None else scales.data_ptr(),
        Q=Q,
        N=N,
        L=L,
        d=d,
        k=k,
        largest=largest,
        threads=torch.get_num_threads(),
        scores=scores.data_ptr(),
        positions=indices.data_ptr(),
    )
    return scores, indices.add_(start)


def mixed_topk(
    queries: torch.Tensor,
    rows: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    mixing: float,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`trackstar_kernels.mixed_topk`; scales (N, L), (N, 1) or None."""
    if mixing == 0:
        return _cosine_topk(queries, rows, squared_norms, k, scales, largest, start)
    N, L, d = rows.shape
    Q = len(queries)
    task = _Task.of(queries, mixing)
    rank = task.factors.shape[1]
    best = torch.empty(Q, 0, dtype=torch.int64)
    redo = []
    chunk = max(1, SCRATCH // (4 * L * (d + rank) + 40 * Q))
    for first in range(0, N, chunk):
        part = slice(first, first + chunk)
        values = dequantize(rows[part], None if scales is None else scales[part], torch.float32)
        scores, doubtful = _scores(task, values, squared_norms[part].sum(1))
        positions = torch.arange(first, first + len(values))
        if doubtful.any():
            redo.append(positions[doubtful])
            scores, positions = scores[:, ~doubtful], positions[~doubtful]
        best = _best(best, scores, positions, k, largest)
    if redo:
        chunk = max(1, SCRATCH // (8 * (2 * d + rank) + 56 * Q))
        for positions in torch.cat(redo).split(chunk):
            scores = _precise_scores(queries, rows, scales, mixing, positions)
            best = _best(best, scores, positions, k, largest)
    scores, positions = _decode(best, largest)
    return scores, positions.add_(start)


def _cosine_topk(
    queries: torch.Tensor,
    rows: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """λ = 0: inner products of unit vectors."""
    wide = queries.double()
    unit = (wide * _inverse_root(wide.square().sum((1, 2), keepdim=True))).float()
    inverse = _inverse_root(squared_norms.sum(1, keepdim=True))
    scales = inverse if scales is None else scales * inverse
    if scales.shape[1] == 1:
        unit, rows = unit.reshape(len(unit), 1, -1), rows.reshape(len(rows), 1, -1)
    return score_topk(unit, rows, k, scales, largest, start)


def _inverse_root(squares: torch.Tensor) -> torch.Tensor:
    """1/√x, and 0 for 0: what makes zero vectors score 0."""
    return torch.where(squares == 0, 0, squares.rsqrt())


# The form of each block's inverse Hessian that the scan uses. With x the queries of the block as rows,
# c = λ / ((1 − λ)·Q) and the common factor 1 / (1 − λ) left out,
#
#   few queries:   C Cᵀ = I + c·x xᵀ (Q × Q)    factor = C⁻¹ x     combine = C⁻ᵀ         base = 1, sign = −c
#   many queries:  C Cᵀ = I + c·xᵀ x (d × d)    factor = C⁻¹       combine = x C⁻ᵀ       base = 0, sign = 1
#
# so that with t = factor · y:  xᵀ R⁻¹ y = combine · t  and  yᵀ R⁻¹ y = base · ‖y‖² + sign · ‖t‖².


def _block_factors(queries: torch.Tensor, mixing: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(factor (r, d), combine (Q, r)) of each block, float64."""
    c = _coupling(mixing, len(queries))
    for x in queries.double().transpose(0, 1):
        gram = x.T @ x if _many(queries) else x @ x.T
        identity = torch.eye(len(gram), dtype=torch.float64)
        inverse = torch.linalg.solve_triangular(
            torch.linalg.cholesky(identity + c * gram), identity, upper=False
        )
        yield (inverse, x @ inverse.T) if _many(queries) else (inverse @ x, inverse.T)


def _coupling(mixing: float, Q: int) -> float:
    return mixing / ((1 - mixing) * Q)


def _many(queries: torch.Tensor) -> bool:
    """Whether the d × d form is used: a little before Q = d, where few directions are left outside the
    queries' span, so that ‖y‖² − c·‖t‖² would cancel for nearly every row.
    """
    Q, _, d = queries.shape
    return 7 * d < 8 * Q


@dataclass
class _Task:
    """What the scan needs to know of the queries, in float32."""

    factors: torch.Tensor  # (L, r, d)
    combine: torch.Tensor  # (Q, L · r), of queries whose norm is 1
    base: float
    sign: float

    @classmethod
    def of(cls, queries: torch.Tensor, mixing: float) -> "_Task":
        Q, L, d = queries.shape
        many = _many(queries)
        rank = d if many else Q
        factors = torch.empty(L, rank, d)
        combine = torch.empty(Q, L, rank, dtype=torch.float64)
        squares = torch.zeros(Q, dtype=torch.float64)
        for block, (factor, combined) in enumerate(_block_factors(queries, mixing)):
            factors[block] = factor
            combine[:, block] = combined
            squares += (combined * (queries[:, block].double() @ factor.T)).sum(1)
        combine *= _inverse_root(squares)[:, None, None]
        base, sign = (0.0, 1.0) if many else (1.0, -_coupling(mixing, Q))
        return cls(factors, combine.flatten(1).float(), base, sign)


def _scores(
    task: _Task, values: torch.Tensor, row_squares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (Q, n) of rows ``values`` (n, L, d), and which rows (n,) float32 did not suffice for.

    Rounding leaves the squared norm an error of about 2⁻²⁴·‖y‖² where terms of that size cancel, and of
    2⁻²⁴·‖y‖ times its root where ‖t‖² is all there is. It must not exceed some twenty roundings of the norm.
    """
    t = torch.bmm(task.factors, values.permute(1, 2, 0)).flatten(0, 1)
    numerators = task.combine @ t
    squares = task.base * row_squares + task.sign * t.square_().sum(0)
    doubtful = squares < (0.05 if task.base else 0.05**2) * row_squares
    return numerators.mul_(torch.where(row_squares == 0, 0, squares.rsqrt())), doubtful


def _precise_scores(
    queries: torch.Tensor,
    rows: torch.Tensor,
    scales: torch.Tensor | None,
    mixing: float,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Scores (Q, n) of the rows at ``positions``, in float64 from the stored values alone."""
    Q, n = len(queries), len(positions)
    c = _coupling(mixing, Q)
    numerators = torch.zeros(Q, n, dtype=torch.float64)
    query_squares = torch.zeros(Q, dtype=torch.float64)
    row_squares = torch.zeros(n, dtype=torch.float64)
    for block, (factor, combine) in enumerate(_block_factors(queries, mixing)):
        y = rows[positions, block].double()
        if scales is not None:
            y *= scales[positions, block if scales.shape[1] > 1 else 0, None]
        t = factor @ y.T
        numerators.addmm_(combine, t)
        query_squares += (combine * (queries[:, block].double() @ factor.T)).sum(1)
        t = t.square_().sum(0)
        row_squares += t if _many(queries) else y.square_().sum(1) - c * t
    return (numerators * _inverse_root(query_squares)[:, None] * _inverse_root(row_squares)).float()


# Results are kept as one integer each, larger is better: the score's bits, made to order as integers do,
# above the complement of the position. The smallest integer decodes to a NaN, and every NaN becomes it.

_POSITION_BITS = 32
_POSITION_MASK = 2**_POSITION_BITS - 1


def _best(
    best: torch.Tensor, scores: torch.Tensor, positions: torch.Tensor, k: int, largest: bool
) -> torch.Tensor:
    """The k best of results ``best`` (Q, n) and of ``scores`` (Q, m) at ``positions`` (m,), best first."""
    scores = (scores if largest else -scores) + 0.0  # -0.0 + 0.0 is 0.0: they are equal scores
    bits = scores.view(torch.int32)
    ordered = torch.where(scores.isnan(), -(2**31), bits ^ ((bits >> 31) & 0x7FFFFFFF))
    keys = (ordered.long() << _POSITION_BITS) | (_POSITION_MASK - positions)
    keys = torch.cat([best, keys], 1)
    return keys.topk(min(k, keys.shape[1]), 1).values


def _decode(best: torch.Tensor, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ordered = (best >> _POSITION_BITS).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return scores if largest else 0.0 - scores, _POSITION_MASK - (best & _POSITION_MASK)
