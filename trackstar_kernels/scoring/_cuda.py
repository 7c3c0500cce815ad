"""Both ops in CUDA C++ (csrc/cuda/scoring.h): what goes in, and what becomes of the keys that come out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trackstar_kernels import _C
from trackstar_kernels._codes import NARROW, unpack
from trackstar_kernels.scoring._hessian import CosineTask, Found, Hessian, PreparedTask, Reached, inverse_root
from trackstar_kernels.scoring._operands import exponents, operand

TILE_ROWS = 128
BLOCKS_AT_ONCE = 2  # thread blocks that a multiprocessor holds, at most
SURVIVORS = 2**30  # bytes that keys may take, if one slice of the rows needs no more


def score_topk(
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`trackstar_kernels.score_topk`; queries (Q, L, d), rows (N, L, …), scales (N, L), (N, 1) or None."""
    queries, rows = queries.contiguous(), _readable(rows, queries.shape[2])
    Q, N = len(queries), len(rows)
    scales = None if scales is None else scales.expand(rows.shape[:2]).contiguous()
    columns = _columns(Q)
    powers = exponents(queries.reshape(Q, 1, -1), rows.dtype)
    packed, undo = operand(queries * powers[:, :, None], rows.dtype, columns), 1 / powers
    survivors, keys = _survivors(Q, k, N, columns, largest, queries.device)
    with _queue(queries.device) as stream:
        _C.cuda_score_topk(
            rows=_rows_at(rows, scales),
            queries=queries.data_ptr(),
            operand=packed.data_ptr(),
            query_scales=undo.data_ptr(),
            columns=columns,
            survivors=survivors,
            stream=stream,
        )
    scores, indices = best(keys, k, largest)
    return scores, indices.add_(start)


def _score_ends(
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    ends: tuple[bool, ...],
    start: int,
    reached: Reached = (),
) -> list[Found]:
    """A scan for each of ``ends``, True for the largest scores; nothing is left out."""
    return [score_topk(queries, rows, k, scales, largest, start) for largest in ends]


def prepare_task(queries: torch.Tensor, mixing: float, asked: slice, task: slice | None) -> PreparedTask:
    """See :func:`trackstar_kernels.scoring.prepare_task`; scales of a call are (N, L), (N, 1) or None."""
    if mixing == 0:
        return CosineTask(queries[asked], _score_ends)
    # A block's factors share an exponent (see _operands.py), so they must be of one size.
    return _MixedTask(Hessian(queries, mixing, asked, task, uneven=False))


class _MixedTask(PreparedTask):
    """λ > 0: the inverse Hessian's factors."""

    def __init__(self, hessian: Hessian) -> None:
        self.hessian = hessian
        queries, (_, L, d) = hessian.queries, hessian.queries.shape
        rank, self.count = hessian.rank, hessian.count
        self.columns = _columns(max(self.count, rank))
        self.factors = queries.new_empty(rank, L, d)
        combine = queries.new_zeros(self.count, L, -(-rank // self.columns) * self.columns)
        squares = queries.new_zeros(self.count, dtype=torch.float64)
        for block, (factor, combined, square) in enumerate(hessian.blocks()):
            self.factors[:, block] = factor
            combine[:, block, :rank] = combined
            squares += square
        combine *= inverse_root(squares)[:, None, None]
        # Of every eight numbers a lane has two neighbours, and those with even index come first.
        combine = combine.unflatten(2, (-1, 4, 2)).mT.reshape(self.count, -1, self.columns)
        self.combine = operand(combine, torch.float32, self.columns)
        self.packed: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}

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
        """A scan for each of ``ends``, True for the largest scores; nothing is left out."""
        return [self._topk(rows, squared_norms, k, scales, largest, start) for largest in ends]

    def _topk(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        largest: bool,
        start: int,
    ) -> Found:
        hessian, narrow = self.hessian, rows.dtype in NARROW
        N, (_, L, d) = len(rows), hessian.queries.shape
        rows, squared_norms = _readable(rows, d), squared_norms.contiguous()
        scales = None if scales is None else scales.expand(N, L).contiguous()
        survivors, keys = _survivors(self.count, k, N, self.columns, largest, rows.device)
        doubtful = torch.ones(N, dtype=torch.bool, device=rows.device)
        if not (narrow and hessian.many):
            factors, undo = self._factors_for(rows.dtype)
            with _queue(rows.device) as stream:
                _C.cuda_mixed_topk(
                    rows=_rows_at(rows, scales),
                    factors=factors.data_ptr(),
                    combine=self.combine.data_ptr(),
                    factor_scales=undo.data_ptr(),
                    squared_norms=squared_norms.data_ptr(),
                    rank=hessian.rank,
                    base=hessian.base,
                    sign=hessian.sign,
                    trusted=hessian.trusted,
                    doubtful=doubtful.data_ptr(),
                    columns=self.columns,
                    survivors=survivors,
                    stream=stream,
                )
        known = squared_norms if narrow else None
        found = best(keys, k, largest)
        scores, indices = hessian.rescored(found, doubtful, rows, scales, known, k, largest)
        return scores, indices.add_(start)

    def _factors_for(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors as an operand for rows of ``dtype``, and what each block's are to be multiplied with."""
        if dtype not in self.packed:
            _, L, _ = self.factors.shape
            powers = exponents(self.factors.transpose(0, 1).reshape(1, L, -1), dtype)
            packed = operand(self.factors * powers[:, :, None], dtype, self.columns)
            self.packed[dtype] = packed, 1 / powers
        return self.packed[dtype]


def best(keys: torch.Tensor, k: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best results (Q, k) of the survivors' keys (Q, …): see csrc/cuda/scoring.h.

    No two keys are equal, so there is one order, whatever sorts them.
    """
    keys = keys.flatten(1).topk(k, dim=1).values
    ordered = (keys >> 32).to(torch.int32)
    scores = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    return scores if largest else 0 - scores, ~keys & 0xFFFFFFFF


# ---- What csrc takes ---------------------------------------------------------------------------------------


def _columns(vectors: int) -> int:
    return 16 if vectors <= 16 else 64


def _readable(rows: torch.Tensor, d: int) -> torch.Tensor:
    """The rows (N, L, d), copied unless each of them is dense; codes of less than a byte as int8."""
    rows = unpack(rows, d)
    return rows if rows[0].is_contiguous() else rows.contiguous()


def _rows_at(rows: torch.Tensor, scales: torch.Tensor | None) -> "_C.CudaRows":
    N, L, d = rows.shape
    return _C.CudaRows(
        values=rows.data_ptr(),
        type=str(rows.dtype).removeprefix("torch."),
        stride=rows.stride(0),
        scales=0 if scales is None else scales.data_ptr(),
        N=N,
        L=L,
        d=d,
    )


def _survivors(
    Q: int, k: int, N: int, columns: int, largest: bool, device: torch.device
) -> "tuple[_C.CudaSurvivors, torch.Tensor]":
    """Room (Q, slices, capacity) for keys: as many slices as keep every multiprocessor busy."""
    tiles = -(-N // TILE_ROWS)
    capacity = 2 * k + 2 * TILE_ROWS  # the threshold follows once in k rows that pass
    slices = min(
        tiles,
        BLOCKS_AT_ONCE * _multiprocessors(device) // -(-Q // columns),
        SURVIVORS // (8 * Q * capacity),
    )
    slices = max(1, slices)
    capacity = min(capacity, -(-tiles // slices) * TILE_ROWS)
    keys = torch.empty(Q, slices, capacity, dtype=torch.int64, device=device)
    survivors = _C.CudaSurvivors(
        keys=keys.data_ptr(), Q=Q, k=k, slices=slices, capacity=capacity, largest=largest
    )
    return survivors, keys


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextmanager
def _queue(device: torch.device) -> Iterator[int]:
    """The stream of ``device`` that calls go to, with the device made the current one."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
