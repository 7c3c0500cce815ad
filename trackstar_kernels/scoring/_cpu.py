"""Both ops in C++ (csrc/scoring.h)."""

from collections.abc import Callable

import torch

from trackstar_kernels import _C
from trackstar_kernels._codes import DTYPES, NARROW
from trackstar_kernels.scoring._hessian import CosineTask, Found, Hessian, inverse_root

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
) -> list[Found]:
    """One scan; the results of each of ``ends``, True for the largest scores."""
    queries = queries.contiguous()
    rows = _readable(rows)
    scales = None if scales is None else scales.expand(rows.shape[:2]).contiguous()
    results = [_results(len(queries), k) for _ in ends]
    _C.score_topk(
        queries=queries.data_ptr(),
        rows=_rows_at(rows, scales, queries.shape[2]),
        tops=_tops_at(results, ends),
        threads=torch.get_num_threads(),
    )
    return [(scores, indices.add_(start)) for scores, indices in results]


def prepare_task(queries: torch.Tensor, mixing: float, asked: slice) -> Callable[..., list[Found]]:
    """See :func:`trackstar_kernels.scoring.prepare_task`; scales of a call are (N, L), (N, 1) or None."""
    return (
        CosineTask(queries[asked], _score_ends) if mixing == 0 else _MixedTask(queries, mixing, asked)
    ).scan


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

    def scan(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        ends: tuple[bool, ...],
        start: int,
    ) -> list[Found]:
        hessian, narrow = self.hessian, rows.dtype in NARROW
        rows, squared_norms = _readable(rows), squared_norms.contiguous()
        scales = None if scales is None else scales.expand(rows.shape[:2]).contiguous()
        results = [_results(len(hessian.queries[hessian.asked]), k) for _ in ends]
        doubtful = torch.empty(len(rows), dtype=torch.bool)
        _C.mixed_topk(
            task=self.panels,
            squared_norms=squared_norms.data_ptr(),
            rows=_rows_at(rows, scales, hessian.queries.shape[2]),
            tops=_tops_at(results, ends),
            doubtful=doubtful.data_ptr(),
            threads=torch.get_num_threads(),
        )
        known = squared_norms if narrow else None
        found = [
            hessian.rescored(result, doubtful, rows, scales, known, k, largest)
            for result, largest in zip(results, ends, strict=True)
        ]
        return [(scores, indices.add_(start)) for scores, indices in found]


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
