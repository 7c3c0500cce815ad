"""Where the Triton backends are tested: on the CUDA device if there is one, else in Triton's interpreter.

Import this before triton: kernels are interpreted or compiled as TRITON_INTERPRET says when they are defined.
"""

import contextlib
import os

import numpy as np
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

# One value of a test's backend axis.
TRITON = pytest.param("triton", marks=[pytest.mark.gpu] if HAS_CUDA else [])


@contextlib.contextmanager
def triton_runs(*tables, arch="sm_90"):
    """Let backend "triton" of the given backend tables run here.

    Without a CUDA device it is interpreted, on CPU tensors, in the configurations of ``arch``.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_CUDA:
            _interpret(patch)
            if arch.startswith("gfx"):
                patch.setattr(torch.version, "hip", "7.0")
            else:
                capability = divmod(int(arch.removeprefix("sm_")), 10)
                patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
            patch.setattr("trackstar_kernels._dispatch.lacks", lambda backend: None)
            for table in tables:
                patch.setitem(table, "cpu", (*table["cpu"], "triton"))
        # NaN and infinity are numbers like any other on a GPU.
        with np.errstate(all="ignore"):
            yield


def _interpret(patch):
    """Mend what the interpreter gets wrong, and leave out the autotuner's timing."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import InterpreterBuilder

    patch.setattr(InterpreterBuilder, "create_dot", _dot)
    patch.setattr(Autotuner, "do_bench", staticmethod(lambda call, quantiles: [0.0] * 3), raising=False)


def _dot(builder, a, b, accumulator, precision, max_num_imprecise_acc):
    """tl.dot as tensor cores compute it: a bfloat16 is not its bit pattern, and tf32 has ten bits of mantissa.

    In tf32x3 the compiler rounds the high parts, and the tensor cores cut off the low ones.
    """
    from triton.runtime.interpreter import TensorHandle

    wide_a, wide_b = _widened(a), _widened(b)
    precision = str(precision).rpartition(".")[2].lower()
    if a.data.dtype != np.float32 or precision == "ieee":
        product = _matmul(wide_a, wide_b)
    else:
        high_a, high_b = _rounded(wide_a), _rounded(wide_b)
        product = _matmul(high_a, high_b)
        if precision == "tf32x3":
            product += _matmul(high_a, _cut(wide_b - high_b)) + _matmul(_cut(wide_a - high_a), high_b)
    return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


def _matmul(a, b):
    """a · b, summed in the same order wherever in the tile a row stands; a BLAS does not promise that."""
    product = np.zeros((len(a), b.shape[1]), np.float32)
    for column, row in zip(a.T, b, strict=True):
        product += column[:, None] * row
    return product


def _widened(operand):
    """A dot's operand as float32."""
    import triton.language as tl

    if operand.dtype.scalar == tl.bfloat16:
        return (operand.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(operand.data, dtype=np.float32)


def _cut(x):
    """``x`` without the last 13 bits of its mantissa."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _rounded(x):
    """``x`` rounded to as many bits."""
    return _cut((x.view(np.uint32) + np.uint32(0x1000)).view(np.float32))
