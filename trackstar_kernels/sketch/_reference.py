"""Philox4x32-10 written out, whole arrays at a time."""

import math

import numpy as np
import torch

from trackstar_kernels.sketch._quantiles import gaussian_quantiles

MASK = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def philox(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Ten rounds of Philox4x32 on arrays of counters.

    Args:
        counter: four uint64 arrays of 32-bit words.
        key: two 32-bit words.

    Returns:
        Four uint64 arrays of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * c0
        product1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & MASK,
            (product0 >> SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & MASK,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def projection_matrix(
    rows: int, cols: int, seed: int, stream: int, kind: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """See :func:`trackstar_kernels.projection_matrix`."""
    if kind == "countsketch":
        (words,) = _words(1, cols, 4, seed, stream)
        chosen = ((words >> np.uint64(1)) * np.uint64(rows)) >> np.uint64(31)
        values = np.where(np.arange(rows)[:, None] == chosen, 1.0 - 2.0 * (words & np.uint64(1)), 0.0)
        return torch.from_numpy(values).to(device, dtype)
    bits = {"rademacher": 1, "gaussian": 16}[kind]
    words = _words(rows, cols, 128 // bits, seed, stream)
    column = np.arange(cols)
    fields = (words >> (column % (32 // bits) * bits).astype(np.uint64)) & np.uint64(2**bits - 1)
    fields = fields.astype(np.int64)
    values = 1.0 - 2.0 * fields if kind == "rademacher" else gaussian_quantiles()[fields]
    return torch.from_numpy(values * (1 / math.sqrt(rows))).to(device, dtype)


def _words(rows: int, cols: int, per_call: int, seed: int, stream: int) -> np.ndarray:
    """(rows, cols) uint64: the word that holds each entry's field, of calls with ``per_call`` fields."""
    row, call = np.meshgrid(
        np.arange(rows, dtype=np.uint64),
        np.arange((cols + per_call - 1) // per_call, dtype=np.uint64),
        indexing="ij",
    )
    low, high = (np.full_like(row, word) for word in (stream & 0xFFFFFFFF, stream >> 32))
    words = np.stack(philox([call, row, low, high], (seed & 0xFFFFFFFF, seed >> 32)), axis=-1)
    return words.reshape(rows, -1).repeat(per_call // 4, axis=1)[:, :cols]
