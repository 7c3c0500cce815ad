"""Timing that survives a noisy machine: all candidates in one process, in turn, medians of the rounds."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import trackstar_kernels
from trackstar_kernels import _C

RESULTS = Path(__file__).parent / "results"


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after one that is not counted.

    A round runs each candidate once, in the order given. On one thread the clock is the thread's own processor
    time, which leaves out other processes' turns; with more it is the wall's.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(1 + rounds):
        for name, run in candidates.items():
            began = clock()
            run()
            if number > 0:
                seconds[name].append(clock() - began)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(seconds)
    return {
        "median": statistics.median(ordered),
        "p20": ordered[len(ordered) // 5],
        "p80": ordered[-1 - len(ordered) // 5],
    }


def ratio(seconds: list[float], baseline: list[float]) -> float:
    """Median of the round-by-round ratios, which a machine's drift leaves alone."""
    return statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))


def ceilings() -> dict[str, float]:
    """What this machine can do with the threads in force: sgemm GFLOP/s and read GB/s."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    out = torch.empty(1024, 1024)
    gemm = min(interleaved({"": lambda: torch.mm(a, b, out=out)}, 15)[""])
    # Larger than any cache here; an 8-row product reads faster than a sum, which is bound by its additions.
    rows, queries = torch.randn(32_768, 4096), torch.randn(4096, 1)
    read = min(interleaved({"": lambda: torch.mm(rows, queries)}, 5)[""])
    return {"sgemm GFLOP/s": 2 * 1024**3 / gemm / 1e9, "read GB/s": rows.nbytes / read / 1e9}


def machine() -> dict[str, object]:
    """What a figure depends on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
        "torch": torch.__version__,
        "backends": trackstar_kernels.available_backends(),
        "ceilings": ceilings(),
    }


def _processor() -> str:
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
