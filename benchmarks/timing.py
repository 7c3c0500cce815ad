"""Timing that survives a noisy machine: all candidates in one process, in turn, medians of the rounds.

Needs torch alone, so that a peer's environment can use it too.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Run = Callable[[], object]

FLUSHED = 256 << 20
"""Bytes written before a CUDA run: more than any cache holds, and time enough for the run's launches to queue up."""


def interleaved(candidates: Mapping[Name, Run], rounds: int, device: str = "cpu") -> dict[Name, list[float]]:
    """Seconds of every candidate in every round, after one round that is not counted.

    A round runs each candidate once, forwards and backwards by turns, so that a machine that slows down during a
    round disfavours nobody. On the CPU and one thread the clock is the thread's own processor time, which leaves out
    other processes' turns; with more threads it is the wall's; on CUDA it is the device's own.
    """
    measure = _stopwatch(device)
    seconds: dict[Name, list[float]] = {name: [] for name in candidates}
    for number in range(1 + rounds):
        for name in reversed(candidates) if number % 2 else candidates:
            taken = measure(candidates[name])
            if number > 0:
                seconds[name].append(taken)
    return seconds


def _stopwatch(device: str) -> Callable[[Run], float]:
    if device == "cuda":
        flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def on_device(run: Run) -> float:
            flushed.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return on_device
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def on_host(run: Run) -> float:
        began = clock()
        run()
        return clock() - began

    return on_host


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


def excess(seconds: list[float], base: list[float], unit: list[float]) -> float:
    """Median over the rounds of (seconds − base) / unit."""
    return statistics.median((a - b) / c for a, b, c in zip(seconds, base, unit, strict=True))
