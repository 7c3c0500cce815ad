"""Philox4x32-10, compiled; the same integers as the reference, a call at a time."""

import math

import numba
import numpy as np
import torch

from trackstar_kernels.sketch._quantiles import gaussian_quantiles


@numba.njit(nogil=True)
def _philox(
    call: int, row: int, seed: np.uint64, stream: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """The four words of counter (call, row, stream)."""
    mask32 = np.uint64(0xFFFFFFFF)
    shift32 = np.uint64(32)
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
    return c0, c1, c2, c3


@numba.njit(nogil=True)
def _fill(out: np.ndarray, table: np.ndarray, bits: int, seed: np.uint64, stream: np.uint64) -> None:
    """Fill out (rows, cols) with table[field], field = the bits that Philox gives entry (row, col)."""
    rows, cols = out.shape
    per_word = 32 // bits
    per_call = 4 * per_word
    field_mask = np.uint64((1 << bits) - 1)
    step = np.uint64(bits)
    words = np.empty(4, np.uint64)
    for row in range(rows):
        for call in range((cols + per_call - 1) // per_call):
            words[0], words[1], words[2], words[3] = _philox(call, row, seed, stream)
            first = call * per_call
            for w in range(4):
                word = words[w]
                start = first + w * per_word
                for col in range(start, min(start + per_word, cols)):
                    out[row, col] = table[word & field_mask]
                    word >>= step


@numba.njit(nogil=True)
def _scatter(out: np.ndarray, signs: np.ndarray, seed: np.uint64, stream: np.uint64) -> None:
    """Put one of the two signs into every column of out (rows, cols), in the row that Philox draws."""
    rows, cols = out.shape
    one = np.uint64(1)
    words = np.empty(4, np.uint64)
    for call in range((cols + 3) // 4):
        words[0], words[1], words[2], words[3] = _philox(call, 0, seed, stream)
        for w in range(min(4, cols - 4 * call)):
            row = ((words[w] >> one) * np.uint64(rows)) >> np.uint64(31)
            out[row, 4 * call + w] = signs[words[w] & one]


def projection_matrix(
    rows: int, cols: int, seed: int, stream: int, kind: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """See :func:`trackstar_kernels.projection_matrix`."""
    # numpy lacks some dtypes: their numbers travel as bit patterns.
    carrier = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    key = np.uint64(seed), np.uint64(stream)
    if kind == "countsketch":
        out, signs = torch.zeros(rows, cols, dtype=dtype), torch.tensor([1.0, -1.0], dtype=dtype)
        _scatter(out.view(carrier).numpy(), signs.view(carrier).numpy(), *key)
        return out.to(device)
    bits, values = (1, np.array([1.0, -1.0])) if kind == "rademacher" else (16, gaussian_quantiles())
    table = torch.from_numpy(values * (1 / math.sqrt(rows))).to(dtype)
    out = torch.empty(rows, cols, dtype=dtype)
    _fill(out.view(carrier).numpy(), table.view(carrier).numpy(), bits, *key)
    return out.to(device)
