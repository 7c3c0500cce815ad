"""Both ops in C++ (csrc/scoring.h)."""

import functools
from collections.abc import Sequence

import torch

from trackstar_kernels import _C
from trackstar_kernels._codes import DTYPES, NARROW
from trackstar_kernels.scoring import _rescoring
from trackstar_kernels.scoring._bounds import TaskBounds
from trackstar_kernels.scoring._hessian import (
    CosineTask,
    Found,
    Hessian,
    PreparedTask,
    Reached,
    WiderRows,
    inverse_root,
)

NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.bfloat16: "bfloat16"}


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
    reached: Reached = (),
    packed: _C.Queries | None = None,
) -> list[Found]:
    """One scan; the results of each of ``ends``, True for the largest scores. ``packed`` are the same queries."""
    queries = queries.contiguous()
    rows = _readable(rows)
    scales = None if scales is None else scales.expand(rows.shape[:2]).contiguous()
    results, reached = [_results(len(queries), k) for _ in ends], _dense(reached)
    stored, tops = _rows_at(rows, scales, queries.shape[2]), _tops_at(results, ends, reached)
    threads = torch.get_num_threads()
    if packed is None:
        _C.score_topk(queries=queries.data_ptr(), rows=stored, tops=tops, threads=threads)
    else:
        _C.score_queries(queries=packed, rows=stored, tops=tops, threads=threads)
    return [(scores, indices.add_(start)) for scores, indices in results]


class _PackedScores:
    """:func:`_score_ends` of queries that are always the same: for rows that are not narrow they are laid out once."""

    def __init__(self) -> None:
        self._packed: dict[tuple[int, torch.dtype], tuple[torch.Tensor, _C.Queries]] = {}

    def __call__(
        self,
        queries: torch.Tensor,
        rows: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        ends: tuple[bool, ...],
        start: int,
        reached: Reached,
    ) -> list[Found]:
        packed = None if rows.dtype in NARROW else self._pack(queries.contiguous(), rows.dtype)
        return _score_ends(queries, rows, k, scales, ends, start, reached, packed)

    def _pack(self, queries: torch.Tensor, dtype: torch.dtype) -> _C.Queries:
        """The queries (Q, L, d) in the kernels' layouts for rows in ``dtype``; these look at the tensor as well."""
        Q, L, d = queries.shape
        if (L, dtype) not in self._packed:
            packed = _C.Queries(values=queries.data_ptr(), Q=Q, L=L, d=d, type=NAMES[dtype])
            self._packed[L, dtype] = queries, packed
        return self._packed[L, dtype][1]


def prepare_task(queries: torch.Tensor, mixing: float, asked: slice, task: slice | None) -> PreparedTask:
    """See :func:`trackstar_kernels.scoring.prepare_task`; scales of a call are (N, L), (N, 1) or None."""
    if mixing == 0:
        return _CosineTask(queries[asked])
    return _MixedTask(Hessian(queries, mixing, asked, task))


def rescored_topk(
    queries: torch.Tensor,
    codes: torch.Tensor,
    wider: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`trackstar_kernels.rescored_topk`; queries (Q, L, d), codes (N, L, …), wider (N, L, d)."""
    queries, codes, squared_norms = queries.contiguous(), _readable(codes), squared_norms.contiguous()
    scales = None if scales is None else scales.expand(codes.shape[:2]).contiguous()
    wider = _readable(wider.flatten(1)[:, None])
    scores, indices = _results(len(queries), k)
    rescored = torch.empty(len(queries), dtype=torch.int64)
    _C.rescored_topk(
        queries=queries.data_ptr(),
        codes=_rows_at(codes, scales, queries.shape[2]),
        wider=_rows_at(wider, None, wider.shape[2]),
        squared_norms=squared_norms.data_ptr(),
        tops=_tops_at([(scores, indices)], (largest,), ()),
        rescored=rescored.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return scores, indices.add_(start), rescored


class _CosineTask(CosineTask):
    """λ = 0. Bounds of narrow rows are those of a task with λ = 0; wider rows are scored as in any scan."""

    def __init__(self, queries: torch.Tensor) -> None:
        super().__init__(queries, _PackedScores())
        self.queries = queries

    @functools.cached_property
    def _mixed(self) -> "_MixedTask":
        return _MixedTask(Hessian(self.queries, 0.0, slice(None)))

    def rescored(
        self,
        codes: torch.Tensor,
        wider: WiderRows,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        ends: tuple[bool, ...],
        reached: Sequence[torch.Tensor | None],
    ) -> tuple[list[Found], int]:
        arrays = codes, wider, squared_norms, k, scales, ends, reached
        return _rescoring.rescored_topk(self._mixed.bounds, self._mixed.parts, self.scan, *arrays)

    def score_bounds(
        self, codes: torch.Tensor, squared_norms: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor:
        return self._mixed.score_bounds(codes, squared_norms, scales)


class _MixedTask(PreparedTask):
    """λ > 0: the inverse Hessian's factors, laid out for the kernels."""

    def __init__(self, hessian: Hessian) -> None:
        self.hessian = hessian
        _, L, d = hessian.queries.shape
        self.panels = _C.Task(
            Q=hessian.count,
            L=L,
            d=d,
            rank=self.hessian.rank,
            base=self.hessian.base,
            sign=self.hessian.sign,
            trusted=self.hessian.trusted,
        )
        squares = torch.zeros(hessian.count, dtype=torch.float64)
        for block, (factor, combine, square) in enumerate(hessian.blocks()):
            factor, combine = factor.float().contiguous(), combine.float().contiguous()
            self.panels.set_block(b=block, factors=factor.data_ptr(), combine=combine.data_ptr())
            squares += square
        weights = inverse_root(squares).float()
        self.panels.set_weights(weights.data_ptr())

    def scan(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        ends: tuple[bool, ...],
        start: int,
        reached: Reached = (),
    ) -> list[Found]:
        hessian, narrow = self.hessian, rows.dtype in NARROW
        rows, squared_norms = _readable(rows), squared_norms.contiguous()
        scales = None if scales is None else scales.expand(rows.shape[:2]).contiguous()
        results, reached = [_results(hessian.count, k) for _ in ends], _dense(reached)
        doubtful = torch.empty(len(rows), dtype=torch.bool)
        _C.mixed_topk(
            task=self.panels,
            squared_norms=squared_norms.data_ptr(),
            rows=_rows_at(rows, scales, hessian.queries.shape[2]),
            tops=_tops_at(results, ends, reached),
            doubtful=doubtful.data_ptr(),
            threads=torch.get_num_threads(),
        )
        known = squared_norms if narrow else None
        found = [
            hessian.rescored(result, doubtful, rows, scales, known, k, largest)
            for result, largest in zip(results, ends, strict=True)
        ]
        return [(scores, indices.add_(start)) for scores, indices in found]

    def rescored(
        self,
        codes: torch.Tensor,
        wider: WiderRows,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        ends: tuple[bool, ...],
        reached: Sequence[torch.Tensor | None],
    ) -> tuple[list[Found], int]:
        arrays = codes, wider, squared_norms, k, scales, ends, reached
        return _rescoring.rescored_topk(self.bounds, self.parts, self.scan, *arrays)

    def score_bounds(
        self, codes: torch.Tensor, squared_norms: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor:
        whole = squared_norms.double().sum(1)
        return self.bounds.off(*self.parts(codes, scales), whole, self.hessian.queries[0].numel()).T.float()

    @functools.cached_property
    def bounds(self) -> TaskBounds:
        """What bounds of narrow rows need of the queries."""
        return TaskBounds.of(self.hessian)

    def parts(
        self, codes: torch.Tensor, scales: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What scores of narrow rows are made of: numerators (n, Q), squares (n,) and inner products (n,)."""
        codes = _readable(codes)
        scales = None if scales is None else scales.expand(codes.shape[:2]).contiguous()
        numerators = torch.empty(len(codes), self.hessian.count)
        squares, inner = (torch.empty(len(codes), dtype=torch.float64) for _ in range(2))
        _C.mixed_parts(
            task=self.panels,
            rows=_rows_at(codes, scales, self.hessian.queries.shape[2]),
            numerators=numerators.data_ptr(),
            squares=squares.data_ptr(),
            inner=inner.data_ptr(),
            threads=torch.get_num_threads(),
        )
        return numerators.double(), squares, inner


# ---- Tensors as csrc takes them ----------------------------------------------------------------------------


def _readable(rows: torch.Tensor) -> torch.Tensor:
    """The rows, copied unless each of them is dense."""
    return rows if rows[0].is_contiguous() else rows.contiguous()


def _results(Q: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(Q, k), torch.empty(Q, k, dtype=torch.int64)


def _rows_at(rows: torch.Tensor, scales: torch.Tensor | None, d: int) -> _C.Rows:
    N, L, _ = rows.shape
    return _C.Rows(
        values=rows.data_ptr(),
        type=NAMES[rows.dtype],
        stride=rows.stride(0),
        scales=0 if scales is None else scales.data_ptr(),
        N=N,
        L=L,
        d=d,
    )


def _dense(reached: Reached) -> Reached:
    """The scores one after another, to be kept for as long as csrc looks at them."""
    return [None if scores is None else scores.contiguous() for scores in reached]


def _tops_at(results: list[Found], ends: tuple[bool, ...], reached: Reached) -> list[_C.TopK]:
    return [
        _C.TopK(
            Q=scores.shape[0],
            k=scores.shape[1],
            largest=largest,
            scores=scores.data_ptr(),
            positions=indices.data_ptr(),
            reached=0 if known is None else known.data_ptr(),
        )
        for (scores, indices), largest, known in zip(
            results, ends, reached or [None] * len(ends), strict=True
        )
    ]
