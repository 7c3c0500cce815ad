"""Where the CUDA backends are tested: in tests/simt/simt.h on the CPU, and on the CUDA device if there is one.

Either way tests give them CPU tensors and get CPU tensors back.
"""

import contextlib
import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from trackstar_kernels import _C
from trackstar_kernels.scoring import _cuda, _operands

ROOT = Path(__file__).parent.parent
SIMT = ROOT / "tests" / "simt"

# Values of a test's backend axis.
CUDA = ["cuda:simulated", pytest.param("cuda:device", marks=pytest.mark.gpu)]

WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror")


@contextlib.contextmanager
def cuda_runs(where, table, multiprocessors=2):
    """Let backend "cuda" of a backend table run for CPU tensors.

    ``where`` is "simulated", "device", or a :class:`Program`. What is simulated has a number of multiprocessors.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table, "cpu", (*table["cpu"], "cuda"))
        if where == "device":
            for name in ("score_topk", "prepare_task"):
                patch.setattr(_cuda, name, _on_device(getattr(_cuda, name)))
        else:
            simulator = _library() if where == "simulated" else where
            patch.setattr("trackstar_kernels._dispatch.lacks", lambda backend: None)
            patch.setattr(_C, "CudaRows", _rows, raising=False)
            patch.setattr(_C, "CudaSurvivors", Survivors, raising=False)
            patch.setattr(_C, "cuda_score_topk", simulator.score_topk, raising=False)
            patch.setattr(_C, "cuda_mixed_topk", simulator.mixed_topk, raising=False)
            patch.setattr(_cuda, "_multiprocessors", lambda device: multiprocessors)
            patch.setattr(_cuda, "_queue", lambda device: contextlib.nullcontext(0))
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


# ---- csrc/cuda on the CPU ----------------------------------------------------------------------------------


def build(output, *options, csrc=ROOT / "csrc"):
    """tests/simt/driver.cpp over the sources in ``csrc``, compiled to ``output``."""
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("simulating CUDA needs g++ on x86-64")
    command = ["g++", "-std=gnu++17", *WARNINGS, f"-I{SIMT}", f"-I{csrc}", *options]
    subprocess.run([*command, SIMT / "driver.cpp", "-o", output], check=True)
    return output


def _structure(name, **fields):
    """A C structure that is made from keywords, as the bindings' classes are."""
    kinds = {"pointer": ctypes.c_void_p, "size": ctypes.c_size_t, "stride": ctypes.c_ssize_t}
    kinds |= {"int": ctypes.c_int, "double": ctypes.c_double, "bool": ctypes.c_bool}
    return type(name, (ctypes.Structure,), {"_fields_": [(f, kinds[kind]) for f, kind in fields.items()]})


Rows = _structure(
    "Rows", values="pointer", type="int", stride="stride", scales="pointer", N="size", L="int", d="int"
)
Survivors = _structure(
    "Survivors", keys="pointer", Q="int", k="int", slices="int", capacity="int", largest="bool"
)
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
ROW_TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def _rows(type, **fields):
    return Rows(type=ROW_TYPES.index(getattr(torch, type)), **fields)


class Library:
    """The module's functions for CUDA from a library for the CPU."""

    def __init__(self, file):
        self.library = ctypes.CDLL(file)
        for function in (self.library.score_topk_on_cpu, self.library.mixed_topk_on_cpu):
            function.restype = ctypes.c_char_p

    def score_topk(self, *, rows, queries, operand, query_scales, columns, survivors, stream):
        arrays = map(ctypes.c_void_p, (queries, operand, query_scales))
        call = self.library.score_topk_on_cpu
        self.check(call(ctypes.byref(rows), *arrays, columns, ctypes.byref(survivors)))

    def mixed_topk(self, *, rows, columns, survivors, stream, **mixing):
        structures = ctypes.byref(rows), ctypes.byref(Mixing(**mixing))
        self.check(self.library.mixed_topk_on_cpu(*structures, columns, ctypes.byref(survivors)))

    def check(self, message):
        if message is not None:
            raise RuntimeError(message.decode())


@functools.cache
def _library():
    with tempfile.TemporaryDirectory() as folder:
        return Library(build(Path(folder) / "simt.so", "-O2", "-shared", "-fPIC"))


class Program:
    """The same from a program, which arrays are sent to; its environment may have a seed for the schedule."""

    def __init__(self, file, **environment):
        self.file, self.environment = file, environment

    def score_topk(self, *, rows, queries, operand, query_scales, columns, survivors, stream):
        arrays = [
            (queries, survivors.Q * rows.L * rows.d * 4),
            (operand, operand_size(survivors.Q, rows.L, rows.d, rows.type, columns)),
            (query_scales, survivors.Q * 4),
        ]
        self.call(rows, survivors, columns, Mixing(), arrays)

    def mixed_topk(self, *, rows, columns, survivors, stream, **fields):
        mixing = Mixing(**fields)
        parts = -(-mixing.rank // columns)
        arrays = [
            (mixing.factors, operand_size(mixing.rank, rows.L, rows.d, rows.type, columns)),
            (mixing.combine, operand_size(survivors.Q, rows.L * parts, columns, 0, columns)),
            (mixing.factor_scales, rows.L * 4),
            (mixing.squared_norms, rows.N * rows.L * 4),
        ]
        self.call(rows, survivors, columns, mixing, arrays)

    def call(self, rows, survivors, columns, mixing, arrays):
        numbers = [mixing.rank > 0, rows.type, rows.stride, rows.N, rows.L, rows.d, survivors.Q, survivors.k]
        numbers += [survivors.slices, survivors.capacity, survivors.largest, columns]
        numbers += [mixing.rank, mixing.base, mixing.sign, mixing.trusted]
        values = ((rows.N - 1) * rows.stride + rows.L * rows.d) * ROW_TYPES[rows.type].itemsize
        arrays = [(rows.values, values), (rows.scales, rows.N * rows.L * 4), *arrays]
        results = [(survivors.keys, survivors.Q * survivors.slices * survivors.capacity * 8)]
        if mixing.rank > 0:
            results.append((mixing.doubtful, rows.N))
        with tempfile.TemporaryDirectory() as folder:
            call, result = Path(folder) / "call", Path(folder) / "result"
            with call.open("wb") as file:
                file.write(" ".join(repr(float(number)) for number in numbers).encode())
                for pointer, size in arrays:
                    file.write(
                        b" 0 " if pointer is None else f" {size} ".encode() + ctypes.string_at(pointer, size)
                    )
            done = subprocess.run(
                [self.file, call, result],
                env=os.environ | self.environment,
                capture_output=True,
                text=True,
                timeout=120,
            )
            if done.returncode != 0:
                raise RuntimeError(done.stderr)
            found = result.read_bytes()
        for pointer, size in results:
            ctypes.memmove(pointer, found[:size], size)
            found = found[size:]


def operand_size(vectors, L, d, row_type, columns):
    """Bytes of a matrix as _operands.operand lays it out."""
    kind, planes = _operands.PLANES[ROW_TYPES[row_type]]
    steps = -(-d * kind.itemsize // _operands.LINE)
    return -(-vectors // columns) * columns * L * steps * planes * _operands.LINE
