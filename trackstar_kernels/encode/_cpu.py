"""Whitening as one batched GEMM over blocks, which is most of its cost, and the codes of int4 in C++."""

import torch

from trackstar_kernels import _C
from trackstar_kernels._codes import code_size
from trackstar_kernels.encode import _trellis
from trackstar_kernels.encode._narrow import narrow_with_norms


def encode_rows(
    rows: torch.Tensor, whiteners: torch.Tensor | None, dtype: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See :func:`trackstar_kernels.encode_rows`."""
    pack = _pack_best_codes if rows.dtype == torch.float32 else _trellis.pack_best_codes
    if whiteners is None:
        return narrow_with_norms(rows, dtype, pack)
    whitened = torch.empty_like(rows, memory_format=torch.contiguous_format)
    torch.bmm(rows.transpose(0, 1), whiteners.transpose(1, 2), out=whitened.transpose(0, 1))
    return narrow_with_norms(whitened, dtype, pack)


def _pack_best_codes(unit: torch.Tensor) -> torch.Tensor:
    """The same codes as :func:`_trellis.pack_best_codes` (csrc/encoding.h)."""
    N, L, d = unit.shape
    unit = unit.contiguous()
    codes = unit.new_empty(N, L, code_size(d, torch.uint8), dtype=torch.uint8)
    _C.pack_best_codes(
        blocks=N * L, d=d, unit=unit.data_ptr(), codes=codes.data_ptr(), threads=torch.get_num_threads()
    )
    return codes
