"""Both ops in C++ (csrc/scoring.h)."""

from collections.abc import Callable

import torch

from trackstar_kernels import _C
from trackstar_kernels._codes import NARROW, unpack
from trackstar_kernels.scoring._hessian import CosineTask, Hessian, inverse_root


def score_topk(
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`trackstar_kernels.score_topk`; queries (Q, L, d), rows (N, L, …), scales (N, L), (N, 1) or None."""
    queries = queries.contiguous()
    rows = _readable(rows, queries.shape[2])
    scales = None if scales is None else scales.expand(rows.shape[:2]).contiguous()
    scores, indices = _results(len(queries), k)
    _C.score_topk(
        queries=queries.data_ptr(),
        rows=_rows_at(rows, scales),
        tops=[_top_at(scores, indices, largest)],
        threads=torch.get_num_threads(),
    )
    return scores, indices.add_(start)


def prepare_task(
    queries: torch.Tensor, mixing: float, asked: slice
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """See :func:`trackstar_kernels.scoring.prepare_task`; scales of a call are (N, L), (N, 1) or None."""
    return (
        CosineTask(queries[asked], score_topk) if mixing == 0 else _MixedTask(queries, mixing, asked)
    ).topk


class _MixedTask:
    """λ > 0: the inverse Hessian's factors, laid out for the kernels."""

    def __init__(self, queries: torch.Tensor, mixing: float, asked: slice) -> None:
        self.hessian = Hessian(queries, mixing, asked)
        Q, L, d = queries.shape
        self.panels = _C.Task(
            Q=len(queries[asked]),
            L=L,
            d=d,
            rank=self.hessian.rank,
            base=self.hessian.base,
            sign=self.hessian.sign,
            trusted=self.hessian.trusted,
        )
        squares = torch.zeros(Q, dtype=torch.float64)
        for block, (factor, combine, square) in enumerate(self.hessian.blocks()):
            factor, combine = factor.float().contiguous(), combine[asked].float().contiguous()
            self.panels.set_block(b=block, factors=factor.data_ptr(), combine=combine.data_ptr())
            squares += square
        weights = inverse_root(squares[asked]).float()
        self.panels.set_weights(weights.data_ptr())

    def topk(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        largest: bool,
        start: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hessian, narrow = self.hessian, rows.dtype in NARROW
        rows, squared_norms = _readable(rows, hessian.queries.shape[2]), squared_norms.contiguous()
        scales = None if scales is None else scales.expand(rows.shape[:2]).contiguous()
        scores, indices = _results(len(hessian.queries[hessian.asked]), k)
        doubtful = torch.ones(len(rows), dtype=torch.bool)
        if not (narrow and hessian.many):
            _C.mixed_topk(
                task=self.panels,
                squared_norms=squared_norms.data_ptr(),
                rows=_rows_at(rows, scales),
                tops=[_top_at(scores, indices, largest)],
                doubtful=doubtful.data_ptr(),
                threads=torch.get_num_threads(),
            )
        known = squared_norms if narrow else None
        scores, indices = hessian.rescored((scores, indices), doubtful, rows, scales, known, k, largest)
        return scores, indices.add_(start)


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


def _top_at(scores: torch.Tensor, indices: torch.Tensor, largest: bool) -> _C.TopK:
    Q, k = scores.shape
    return _C.TopK(Q=Q, k=k, largest=largest, scores=scores.data_ptr(), positions=indices.data_ptr())
