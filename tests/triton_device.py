"""Where the Triton backends are tested: on the CUDA device if there is one, else in Triton's interpreter.

Import this before triton: kernels are interpreted or compiled as TRITON_INTERPRET says when they are defined.
"""

import contextlib
import os

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

# One value of a test's backend axis.
TRITON = pytest.param("triton", marks=[pytest.mark.gpu] if HAS_CUDA else [])


@contextlib.contextmanager
def triton_runs(*tables, capability=(9, 0)):
    """Let backend "triton" of the given backend tables run here: interpreted, on CPU tensors, if need be."""
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_CUDA:
            _interpret(patch)
            patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
            patch.setattr("trackstar_kernels._dispatch.lacks", lambda backend: None)
            for table in tables:
                patch.setitem(table, "cpu", (*table["cpu"], "triton"))
        yield


def _interpret(patch):
    """Mend what the interpreter gets wrong, and leave out the autotuner's timing."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import InterpreterBuilder

    patch.setattr(InterpreterBuilder, "create_dot", _dot)
    patch.setattr(Autotuner, "do_bench", staticmethod(lambda call, quantiles: [0.0] * 3), raising=False)


def _dot(builder, a, b, accumulator, precision, max_num_imprecise_acc):
    """tl.dot as tensor cores compute it: bfloat16 is not its bit pattern, and tf32 has ten bits of mantissa."""
    from triton.runtime.interpreter import TensorHandle

    wide_a, wide_b = _wide(a), _wide(b)
    name = str(precision).rpartition(".")[2].lower()
    if a.data.dtype == "float32" and name != "ieee":
        high_a, high_b = _tf32(wide_a), _tf32(wide_b)
        product = high_a @ high_b
        if name == "tf32x3":
            product = product + high_a @ _tf32(wide_b - high_b) + _tf32(wide_a - high_a) @ high_b
    else:
        product = wide_a @ wide_b
    return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


def _wide(operand):
    """A dot's operand as float32."""
    import triton.language as tl

    if operand.dtype.scalar == tl.bfloat16:
        return (operand.data.astype("uint32") << 16).view("float32")
    return operand.data.astype("float32")


def _tf32(x):
    """``x`` with the last 13 bits of its mantissa cut off."""
    import numpy as np

    return (np.ascontiguousarray(x).view("uint32") & np.uint32(0xFFFFE000)).view("float32")
