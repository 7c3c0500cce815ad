"""Both ops in C++ (csrc/scoring.h); what mixed_topk needs to know of its queries is prepared here."""

from collections.abc import Callable, Iterator

import torch

from trackstar_kernels import _C
from trackstar_kernels._codes import NARROW, unpack
from trackstar_kernels.scoring._merge import merge_topk

# Float32 keeps the squared norm of a row to about 2⁻²⁴ of ‖y‖² where terms of that size cancel, and its root
# to 2⁻²⁴ of ‖y‖ where ‖t‖² is all there is: where less than this is left of ‖y‖², it is computed in float64.
TRUSTED_DIFFERENCE = 0.05
TRUSTED_SQUARE = 0.05**2

Found = tuple[torch.Tensor, torch.Tensor]  # scores and indices

SCRATCH = 64 * 2**20  # bytes of working memory for doing that


def score_topk(
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`trackstar_kernels.score_topk`; queries (Q, L, d), rows (N, L, …), scales (N, L), (N, 1) or None."""
    (found,) = _score_ends(queries, rows, k, scales, (largest,), start)
    return found


def _score_ends(
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    ends: tuple[bool, ...],
    start: int,
) -> list[Found]:
    """One scan; the results of each of ``ends``, True for the largest scores."""
    queries = queries.contiguous()
    rows = _readable(rows, queries.shape[2])
    scales = None if scales is None else scales.expand(rows.shape[:2]).contiguous()
    results = [_results(len(queries), k) for _ in ends]
    _C.score_topk(
        queries=queries.data_ptr(),
        rows=_rows_at(rows, scales),
        tops=_tops_at(results, ends),
        threads=torch.get_num_threads(),
    )
    return [(scores, indices.add_(start)) for scores, indices in results]


def prepare_task(queries: torch.Tensor, mixing: float, asked: slice) -> Callable[..., list[Found]]:
    """See :func:`trackstar_kernels.scoring.prepare_task`; scales of a call are (N, L), (N, 1) or None."""
    return (_CosineTask(queries[asked]) if mixing == 0 else _MixedTask(queries, mixing, asked)).scan


class _CosineTask:
    """λ = 0: inner products of unit vectors."""

    def __init__(self, queries: torch.Tensor) -> None:
        wide = queries.double()
        self.unit = (wide * _inverse_root(wide.square().sum((1, 2), keepdim=True))).float()

    def scan(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        ends: tuple[bool, ...],
        start: int,
    ) -> list[Found]:
        unit = self.unit
        inverse = _inverse_root(squared_norms.sum(1, keepdim=True))
        scales = inverse if scales is None else scales * inverse
        if scales.shape[1] == 1 and rows.dtype not in NARROW:
            unit, rows = unit.reshape(len(unit), 1, -1), rows.reshape(len(rows), 1, -1)
        return _score_ends(unit, rows, k, scales, ends, start)


class _MixedTask:
    """λ > 0: the inverse Hessian's factors, laid out for the kernels."""

    def __init__(self, queries: torch.Tensor, mixing: float, asked: slice) -> None:
        self.queries, self.mixing, self.asked = queries, mixing, asked
        Q, L, d = queries.shape
        many = _many(queries)
        self.panels = _C.Task(
            Q=len(queries[asked]),
            L=L,
            d=d,
            rank=d if many else Q,
            base=0.0 if many else 1.0,
            sign=1.0 if many else -_coupling(queries, mixing),
            trusted=TRUSTED_SQUARE if many else TRUSTED_DIFFERENCE,
        )
        squares = torch.zeros(Q, dtype=torch.float64)
        for block, (factor, combine, square) in enumerate(_block_factors(queries, mixing)):
            factor, combine = factor.float().contiguous(), combine[asked].float().contiguous()
            self.panels.set_block(b=block, factors=factor.data_ptr(), combine=combine.data_ptr())
            squares += square
        weights = _inverse_root(squares[asked]).float()
        self.panels.set_weights(weights.data_ptr())

    def scan(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        ends: tuple[bool, ...],
        start: int,
    ) -> list[Found]:
        narrow = rows.dtype in NARROW
        rows, squared_norms = _readable(rows, self.queries.shape[2]), squared_norms.contiguous()
        scales = None if scales is None else scales.expand(rows.shape[:2]).contiguous()
        results = [_results(len(self.queries[self.asked]), k) for _ in ends]
        doubtful = torch.ones(len(rows), dtype=torch.bool)
        if not (narrow and _many(self.queries)):
            _C.mixed_topk(
                task=self.panels,
                squared_norms=squared_norms.data_ptr(),
                rows=_rows_at(rows, scales),
                tops=_tops_at(results, ends),
                doubtful=doubtful.data_ptr(),
                threads=torch.get_num_threads(),
            )
        redo = doubtful.nonzero()[:, 0]
        found = min(k, len(rows) - len(redo))
        results = [(scores[:, :found], indices[:, :found]) for scores, indices in results]
        Q, _, d = self.queries.shape
        for positions in redo.split(max(1, SCRATCH // (8 * (3 * Q + 3 * d)))) if len(redo) else ():
            known = squared_norms[positions] if narrow else None
            precise = _precise_scores(self.queries, rows, scales, self.mixing, positions, known)[self.asked]
            more = precise, positions.expand_as(precise)
            results = [
                merge_topk([result, more], k, largest) for result, largest in zip(results, ends, strict=True)
            ]
        return [(scores, indices.add_(start)) for scores, indices in results]


def _inverse_root(squares: torch.Tensor) -> torch.Tensor:
    """1/√x, and 0 for 0: what makes zero vectors score 0."""
    return torch.where(squares == 0, 0, squares.rsqrt())


# ---- The inverse Hessian in the form that the scan uses ----------------------------------------------------
# With x the queries of a block as rows, c = λ / ((1 − λ)·Q), and every term times 1 − λ,
#
#   few queries:   C Cᵀ = I + c·x xᵀ (Q × Q)    factor = C⁻¹ x    combine = C⁻ᵀ      yᵀ R⁻¹ y = ‖y‖² − c·‖t‖²
#   many queries:  C Cᵀ = I + c·xᵀ x (d × d)    factor = C⁻¹      combine = x C⁻ᵀ    yᵀ R⁻¹ y = ‖t‖²
#
# where t = factor · y, and x R⁻¹ y = combine · t in both.


def _coupling(queries: torch.Tensor, mixing: float) -> float:
    return mixing / ((1 - mixing) * len(queries))


def _many(queries: torch.Tensor) -> bool:
    """Whether the d × d form is used: a little before Q = d, where few directions are left outside the
    queries' span, so that ‖y‖² − c·‖t‖² would cancel for nearly every row.
    """
    Q, _, d = queries.shape
    return 7 * d < 8 * Q


def _block_factors(
    queries: torch.Tensor, mixing: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each block factor (r, d), combine (Q, r) and xᵀ R⁻¹ x (Q,), float64."""
    c, many = _coupling(queries, mixing), _many(queries)
    for x in (block.double() for block in queries.unbind(1)):
        gram = x.T @ x if many else x @ x.T
        identity = torch.eye(len(gram), dtype=torch.float64)
        cholesky = torch.linalg.cholesky(identity + c * gram)
        inverse = torch.linalg.solve_triangular(cholesky, identity, upper=False)
        if many:
            combine = x @ inverse.T
            yield inverse, combine, combine.square().sum(1)
        else:
            yield inverse @ x, inverse.T, (inverse * (inverse @ gram)).sum(0)


def _precise_scores(
    queries: torch.Tensor,
    rows: torch.Tensor,
    scales: torch.Tensor | None,
    mixing: float,
    positions: torch.Tensor,
    squared_norms: torch.Tensor | None,
) -> torch.Tensor:
    """Scores (Q, n) of the rows at ``positions``, in float64.

    The rows' norms come from the stored values alone, and where narrowing took something from them, from the
    ``squared_norms`` (n, L) that they had before.
    """
    many = _many(queries)
    numerators = torch.zeros(len(queries), len(positions), dtype=torch.float64)
    query_squares = torch.zeros(len(queries), dtype=torch.float64)
    row_squares = torch.zeros(len(positions), dtype=torch.float64)
    kept = torch.zeros(len(positions), dtype=torch.float64)
    for block, (factor, combine, square) in enumerate(_block_factors(queries, mixing)):
        y = rows[positions, block].double()
        if scales is not None:
            y *= scales[positions, block, None]
        t = factor @ y.T
        numerators.addmm_(combine, t)
        query_squares += square
        squares = y.square().sum(1)
        kept += squares
        row_squares += t.square().sum(0) if many else squares - _coupling(queries, mixing) * t.square().sum(0)
    if squared_norms is not None:
        row_squares += (squared_norms.double().sum(1) - kept).clamp_min(0)
    return (numerators * _inverse_root(query_squares)[:, None] * _inverse_root(row_squares)).float()


# ---- Tensors as csrc takes them ----------------------------------------------------------------------------


def _readable(rows: torch.Tensor, d: int) -> torch.Tensor:
    """The rows (N, L, d), copied unless each of them is dense floats."""
    if rows.dtype in NARROW:
        return unpack(rows, d).half()
    return rows if rows[0].is_contiguous() else rows.contiguous()


def _results(Q: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(Q, k), torch.empty(Q, k, dtype=torch.int64)


def _rows_at(rows: torch.Tensor, scales: torch.Tensor | None) -> _C.Rows:
    N, L, d = rows.shape
    return _C.Rows(
        values=rows.data_ptr(),
        type=str(rows.dtype).removeprefix("torch."),
        stride=rows.stride(0),
        scales=0 if scales is None else scales.data_ptr(),
        N=N,
        L=L,
        d=d,
    )


def _tops_at(results: list[Found], ends: tuple[bool, ...]) -> list[_C.TopK]:
    return [
        _C.TopK(
            Q=scores.shape[0],
            k=scores.shape[1],
            largest=largest,
            scores=scores.data_ptr(),
            positions=indices.data_ptr(),
        )
        for (scores, indices), largest in zip(results, ends, strict=True)
    ]
