"""Triton kernels of encode_rows; `_triton.py` launches them."""

import triton
import triton.language as tl


@triton.jit
def _encode_kernel(
    rows_ptr,  # (N, L, d) float32
    whiteners_ptr,  # (L, d, d) float32
    codes_ptr,  # (N, L, d) float32 or float16
    squared_norms_ptr,  # (N, L) float32
    rows,
    size,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Whiten BLOCK_N rows of one block, and sum their squared norms in float64. Grid: rows, blocks."""
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    here = n < rows - first
    start = (first * blocks + block) * size
    rows_ptr += start
    codes_ptr += start
    whiteners_ptr += block.to(tl.int64) * size * size
    stride = blocks * size
    norms = tl.zeros((BLOCK_N,), tl.float64)
    for d0 in range(0, size, BLOCK_D):
        whitened = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for k0 in range(0, size, BLOCK_K):
            x = tl.load(
                rows_ptr + k0 + (n[:, None] * stride + k[None, :]),
                mask=here[:, None] & (k[None, :] < size - k0),
                other=0.0,
            )
            w = tl.load(
                whiteners_ptr + d0 * size + k0 + (d[None, :] * size + k[:, None]),
                mask=(d[None, :] < size - d0) & (k[:, None] < size - k0),
                other=0.0,
            )
            whitened = tl.dot(x, w, whitened, input_precision=PRECISION)
        tl.store(
            codes_ptr + d0 + (n[:, None] * stride + d[None, :]),
            whitened.to(codes_ptr.dtype.element_ty),
            mask=here[:, None] & (d[None, :] < size - d0),
        )
        wide = whitened.to(tl.float64)
        norms += tl.sum(wide * wide, axis=1)
    tl.store(squared_norms_ptr + (first + n) * blocks + block, norms.to(tl.float32), mask=here)
