"""Whitening, norms and narrowing in one pass over the rows."""

import torch
import triton

from trackstar_kernels._architecture import ARCHITECTURES, architecture
from trackstar_kernels.encode._kernels import _encode_kernel
from trackstar_kernels.encode._narrow import narrow, narrow_with_norms

# The autotuner chooses the depth of the pipeline alone, which changes no bits.
ENCODE = {
    (arch,): triton.autotune(
        [
            triton.Config(
                {
                    "BLOCK_N": 64,
                    "BLOCK_D": 64,
                    "BLOCK_K": 32,
                    "PRECISION": "ieee" if arch == "gfx942" else "tf32x3",
                },
                num_warps=8,
                num_stages=stages,
            )
            for stages in ((2,) if arch == "gfx942" else (3, 4))
        ],
        key=["size"],
    )(_encode_kernel)
    for arch in ARCHITECTURES
}


def encode_rows(
    rows: torch.Tensor, whiteners: torch.Tensor | None, dtype: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See :func:`trackstar_kernels.encode_rows`."""
    if rows.dtype == torch.float64:
        raise TypeError("backend 'triton' computes in float32; for float64 rows use backend='reference'")
    if whiteners is None:
        return narrow_with_norms(rows, dtype)
    rows, whiteners = rows.contiguous(), whiteners.contiguous()
    count, blocks, size = rows.shape
    whitened = rows.new_empty(rows.shape, dtype=torch.float16 if dtype == "float16" else torch.float32)
    squared_norms = rows.new_zeros(count, blocks)
    if rows.numel() > 0:

        def grid(meta: dict[str, int]) -> tuple[int, int]:
            return triton.cdiv(count, meta["BLOCK_N"]), blocks

        with torch.cuda.device_of(rows):
            ENCODE[(architecture(rows.device),)][grid](rows, whiteners, whitened, squared_norms, count, size)
    return *narrow(whitened, dtype), squared_norms
