"""Where the CUDA backends are tested: in tests/simt/simt.h on the CPU, and on the CUDA device if there is one.

Either way tests give them CPU tensors and get CPU tensors back.
"""

import contextlib
import ctypes
import functools
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from trackstar_kernels import _C
from trackstar_kernels.scoring import _cuda

ROOT = Path(__file__).parent.parent
SIMT = ROOT / "tests" / "simt"

# Values of a test's backend axis.
CUDA = ["cuda:simulated", pytest.param("cuda:device", marks=pytest.mark.gpu)]

WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror")


@contextlib.contextmanager
def cuda_runs(where, table, multiprocessors=2):
    """Let backend "cuda" of the given backend table run ``where``, "simulated" or "device", for CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table, "cpu", (*table["cpu"], "cuda"))
        if where == "simulated":
            _simulate(patch, multiprocessors)
        else:
            for name in ("score_topk", "prepare_task"):
                patch.setattr(_cuda, name, _on_device(getattr(_cuda, name)))
        yield


def _on_device(function):
    """``function`` for CPU tensors, run on the device."""

    def moved(value, device):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, tuple):
            return tuple(moved(item, device) for item in value)
        return _on_device(value) if callable(value) else value

    return lambda *arguments: moved(function(*(moved(value, "cuda") for value in arguments)), "cpu")


def build(output, *options, sources=(), include=SIMT, compiler="g++"):
    """Compile csrc/cuda for the CPU. Whoever includes before ``include`` sees other sources."""
    if platform.machine() != "x86_64" or shutil.which(compiler) is None:
        pytest.skip(f"simulating CUDA needs {compiler} on x86-64")
    command = [compiler, "-std=gnu++17", *WARNINGS, f"-I{include}", f"-I{ROOT / 'csrc'}", *options]
    subprocess.run([*command, *(sources or [SIMT / "driver.cpp"]), "-o", output], check=True)
    return output


@functools.cache
def _simulator():
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(build(Path(folder) / "simt.so", "-O2", "-shared", "-fPIC"))
    for function in (library.score_topk_on_cpu, library.mixed_topk_on_cpu):
        function.restype = ctypes.c_char_p
    return library


def _structure(name, **fields):
    """A C structure that is made from keywords, as the bindings' classes are."""
    kinds = {"pointer": ctypes.c_void_p, "size": ctypes.c_size_t, "stride": ctypes.c_ssize_t}
    kinds |= {"int": ctypes.c_int, "double": ctypes.c_double, "bool": ctypes.c_bool}
    return type(name, (ctypes.Structure,), {"_fields_": [(f, kinds[kind]) for f, kind in fields.items()]})


Rows = _structure(
    "Rows", values="pointer", type="int", stride="stride", scales="pointer", N="size", L="int", d="int"
)
Survivors = _structure("Survivors", keys="pointer", Q="int", k="int", slices="int", capacity="int", largest="bool")
Mixing = _structure(
    "Mixing",
    factors="pointer",
    combine="pointer",
    factor_scales="pointer",
    squared_norms="pointer",
    rank="int",
    base="double",
    sign="double",
    trusted="double",
    doubtful="pointer",
)
ROW_TYPES = ["float32", "float16", "bfloat16", "int8"]


def _check(message):
    if message is not None:
        raise RuntimeError(message.decode())


def _simulate(patch, multiprocessors):
    """The module's CUDA functions, on the CPU."""

    def rows(type, **fields):
        return Rows(type=ROW_TYPES.index(type), **fields)

    def score_topk(*, rows, queries, operand, query_scales, columns, survivors, stream):
        pointers = map(ctypes.c_void_p, (queries, operand, query_scales))
        _check(
            _simulator().score_topk_on_cpu(ctypes.byref(rows), *pointers, columns, ctypes.byref(survivors))
        )

    def mixed_topk(*, rows, columns, survivors, stream, **mixing):
        structures = ctypes.byref(rows), ctypes.byref(Mixing(**mixing))
        _check(_simulator().mixed_topk_on_cpu(*structures, columns, ctypes.byref(survivors)))

    patch.setattr("trackstar_kernels._dispatch.lacks", lambda backend: None)
    patch.setattr(_C, "CudaRows", rows, raising=False)
    patch.setattr(_C, "CudaSurvivors", Survivors, raising=False)
    patch.setattr(_C, "cuda_score_topk", score_topk, raising=False)
    patch.setattr(_C, "cuda_mixed_topk", mixed_topk, raising=False)
    patch.setattr(_cuda, "_multiprocessors", lambda device: multiprocessors)
    patch.setattr(_cuda, "_queue", lambda device: contextlib.nullcontext(0))
