"""Philox4x32-10 on the device: the integers of the reference, and its table of values."""

import math

import numpy as np
import torch
import triton

from trackstar_kernels.sketch._kernels import _countsketch_kernel, _fields_kernel
from trackstar_kernels.sketch._quantiles import gaussian_quantiles

TILE = {"BLOCK_ROWS": 4, "BLOCK_CALLS": 8}


def _launcher(kernel: triton.JITFunction, **fixed: int) -> triton.runtime.Autotuner:
    """The kernel in its one configuration."""
    return triton.autotune([triton.Config(TILE | fixed, num_warps=4)], key=[])(kernel)


FIELDS = {(bits,): _launcher(_fields_kernel, BITS=bits) for bits in (1, 16)}
COUNTSKETCH = {(): _launcher(_countsketch_kernel)}


def projection_matrix(
    rows: int, cols: int, seed: int, stream: int, kind: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """See :func:`trackstar_kernels.projection_matrix`."""
    out = torch.empty(rows, cols, dtype=dtype, device=device)
    with torch.cuda.device_of(out):
        if kind == "countsketch":
            COUNTSKETCH[()][_grid(rows, cols, 4)](out, rows, cols, seed, stream)
            return out
        bits, values = (1, np.array([1.0, -1.0])) if kind == "rademacher" else (16, gaussian_quantiles())
        table = torch.from_numpy(values * (1 / math.sqrt(rows))).to(dtype).to(device)
        FIELDS[(bits,)][_grid(rows, cols, 128 // bits)](out, table, rows, cols, seed, stream)
    return out


def _grid(rows: int, cols: int, per_call: int) -> tuple[int]:
    """One program for each tile of rows and calls."""
    return (triton.cdiv(rows, TILE["BLOCK_ROWS"]) * triton.cdiv(cols, TILE["BLOCK_CALLS"] * per_call),)
