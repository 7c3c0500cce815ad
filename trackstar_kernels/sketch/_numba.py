"""Philox4x32-10, compiled; the same integers as the reference, a row at a time."""

import math

import numba
import numpy as np
import torch

from trackstar_kernels.sketch._quantiles import gaussian_quantiles


@numba.njit(nogil=True)
def _fill(out: np.ndarray, table: np.ndarray, bits: int, seed: np.uint64, stream: np.uint64) -> None:
    """Fill out (rows, cols) with table[field], field = the bits that Philox gives entry (row, col)."""
    mask32 = np.uint64(0xFFFFFFFF)
    shift32 = np.uint64(32)
    rows, cols = out.shape
    per_word = 32 // bits
    per_call = 4 * per_word
    field_mask = np.uint64((1 << bits) - 1)
    step = np.uint64(bits)
    words = np.empty(4, np.uint64)
    for row in range(rows):
        for call in range((cols + per_call - 1) // per_call):
            c0, c1, c2, c3 = np.uint64(call), np.uint64(row), stream & mask32, stream >> shift32
            k0, k1 = seed & mask32, seed >> shift32
            for _ in range(10):
                product0 = np.uint64(0xD2511F53) * c0
                product1 = np.uint64(0xCD9E8D57) * c2
                c0 = (product1 >> shift32) ^ c1 ^ k0
                c1 = product1 & mask32
                c2 = (product0 >> shift32) ^ c3 ^ k1
                c3 = product0 & mask32
                k0 = (k0 + np.uint64(0x9E3779B9)) & mask32
                k1 = (k1 + np.uint64(0xBB67AE85)) & mask32
            words[0], words[1], words[2], words[3] = c0, c1, c2, c3
            first = call * per_call
            for w in range(4):
                word = words[w]
                start = first + w * per_word
                for col in range(start, min(start + per_word, cols)):
                    out[row, col] = table[word & field_mask]
                    word >>= step


def projection_matrix(
    rows: int, cols: int, seed: int, stream: int, kind: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """See :func:`trackstar_kernels.projection_matrix`."""
    bits, values = (1, np.array([1.0, -1.0])) if kind == "rademacher" else (16, gaussian_quantiles())
    table = torch.from_numpy(values * (1 / math.sqrt(rows))).to(dtype)
    # Tables of dtypes that numpy lacks travel as their bit patterns.
    carrier = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    out = torch.empty(rows, cols, dtype=dtype)
    _fill(out.view(carrier).numpy(), table.view(carrier).numpy(), bits, np.uint64(seed), np.uint64(stream))
    return out.to(device)
