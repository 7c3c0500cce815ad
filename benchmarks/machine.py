"""What the figures depend on: the machine, what it can do at most, and where they are kept."""

import ctypes
import functools
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import trackstar_kernels
from benchmarks.timing import interleaved
from trackstar_kernels import _C

RESULTS = Path(__file__).parent / "results"


@functools.cache
def ceilings(device: str = "cpu") -> dict[str, float]:
    """What the device can do, measured once: GFLOP/s of large matmuls and GB/s of memory.

    On the CPU, with the threads in force: float32 multiply-adds that the processor can start, in the widest vectors
    of the level in force; torch's matmul; and reading. On CUDA bfloat16 and, where torch may use it for float32, tf32,
    and copying (bytes read and bytes written).
    """
    return _cuda_ceilings() if device == "cuda" else _cpu_ceilings()


def _cpu_ceilings() -> dict[str, float]:
    # Larger than any cache here; a matrix–vector product reads faster than a sum, which is bound by its additions.
    rows, query = torch.randn(32_768, 4096), torch.randn(4096, 1)
    read = min(interleaved({"": lambda: torch.mm(rows, query)}, 5)[""])
    return {
        "multiply-add GFLOP/s": torch.get_num_threads() * _multiply_adds(),
        "sgemm GFLOP/s": _matmul(1024, torch.float32, "cpu"),
        "read GB/s": rows.nbytes / read / 1e9,
    }


def _multiply_adds() -> float:
    """GFLOP/s of one core that does nothing else, at the instruction set level in force."""
    gflops = _peak().gflops
    gflops.restype = ctypes.c_double
    return gflops()


def read_rows(rows: torch.Tensor, streams: int) -> None:
    """Read dense rows (N, …) and do nothing with them, 1, 4 or 8 rows at once: what memory can deliver at most."""
    address, size = ctypes.c_void_p(rows.data_ptr()), ctypes.c_size_t
    _peak().read_rows(address, size(len(rows)), size(rows[0].nbytes), ctypes.c_int(streams))


@functools.cache
def _peak() -> ctypes.CDLL:
    """peak.cpp, built for the instruction set level in force."""
    level = _C.isa()
    targets = {"baseline": "x86-64", "neon": "native", "avx-vnni": "x86-64-v3"}
    targets |= dict.fromkeys(("avx512-vnni", "avx512-bf16", "amx"), "x86-64-v4")
    target = targets.get(level, level)
    RESULTS.mkdir(exist_ok=True)
    library = RESULTS / f"peak-{level}.so"
    source = Path(__file__).with_name("peak.cpp")
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-O3", f"-march={target}", "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def _cuda_ceilings() -> dict[str, float]:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = min(interleaved({"": lambda: target.copy_(source)}, 9, "cuda")[""])
    return {
        "bf16 GFLOP/s": _matmul(8192, torch.bfloat16, "cuda"),
        "tf32 GFLOP/s": _matmul(8192, torch.float32, "cuda"),
        "copy GB/s": 2 * source.nbytes / copy / 1e9,
    }


def _matmul(size: int, dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of a square product."""
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / min(interleaved({"": lambda: torch.mm(a, b, out=out)}, 15, device)[""]) / 1e9


def describe(device: str = "cpu") -> str:
    """The device and its ceilings in one line."""
    limits = ", ".join(f"{value:,.0f} {name}" for name, value in ceilings(device).items())
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}; {limits}"
    return f"{_C.isa()}, {torch.get_num_threads()} thread(s); {limits}"


def machine() -> dict[str, object]:
    """What a figure depends on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
        "torch": torch.__version__,
        "backends": trackstar_kernels.available_backends(),
        "ceilings": ceilings(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def save(name: str, cases: object) -> Path:
    """Write a benchmark's cases, with the machine they ran on, as JSON under benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=1) + "\n")
    return path
