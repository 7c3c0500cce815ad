"""project_gradients against the bare per-example gradient, and against the obvious torch code.

    python -m benchmarks.gradient [--threads N]

The baseline is the matmul that an exact correction cannot avoid, torch.bmm(ΔᵀX), into memory that is already
there; "torch" goes on to scale it and project it. Everything is checked against the float64 reference before
it is timed. Rounds are interleaved, and ratios are medians over rounds.
"""

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch

from trackstar_kernels import _C, project_gradients

BATCH = 8
SHAPES = [(768, 768), (2048, 768), (768, 2048), (576, 1536), (192, 576)]  # O, I
TOKENS = [16, 128, 512]
SKETCHES = [16, 64]
SECONDS = 2.0  # of rounds, for each line


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark project_gradients on the CPU.")
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print(f"torch {torch.__version__}, {_C.isa()}, {torch.get_num_threads()} thread(s), B = {BATCH}, p = q")
    print("                      time / time of bmm        GFLOP/s")
    print("       O×I    T   p    exact   torch  no scale    exact")
    for out_features, in_features in SHAPES:
        for tokens in TOKENS:
            for sketch in SKETCHES:
                measure(out_features, in_features, tokens, sketch)


def measure(out_features: int, in_features: int, tokens: int, sketch: int) -> None:
    """Check one shape, time it and print its line."""
    activations = torch.randn(BATCH, tokens, in_features)
    output_grads = torch.randn(BATCH, tokens, out_features)
    left = torch.randn(sketch, out_features)
    right = torch.randn(sketch, in_features)
    scale = torch.rand(out_features, in_features)
    gradients = torch.empty(BATCH, out_features, in_features)

    def bmm() -> torch.Tensor:
        return torch.bmm(output_grads.mT, activations, out=gradients)

    def exact() -> torch.Tensor:
        return project_gradients(activations, output_grads, left, right, scale=scale)

    def obvious() -> torch.Tensor:
        return left @ (bmm().mul_(scale) @ right.T)

    def unscaled() -> torch.Tensor:
        return project_gradients(activations, output_grads, left, right)

    doubles = [tensor.double() for tensor in (activations, output_grads, left, right)]
    truth = project_gradients(*doubles, scale=scale.double(), backend="reference")
    check("exact", exact(), truth)
    check("torch", obvious(), truth)
    check("no scale", unscaled(), project_gradients(*doubles, backend="reference"))

    baseline, *others = rounds([bmm, exact, obvious, unscaled])
    ratios = [median(a / b for a, b in zip(times, baseline, strict=True)) for times in others]
    flops = 2 * BATCH * out_features * (in_features * (tokens + sketch) + sketch * sketch)
    shape = f"{out_features}×{in_features}"
    print(
        f"{shape:>10} {tokens:>4} {sketch:>3} {ratios[0]:>8.2f} {ratios[1]:>7.2f} {ratios[2]:>9.2f}", end=""
    )
    print(f" {flops / median(others[0]) / 1e9:>8.0f}", flush=True)


def check(name: str, got: torch.Tensor, truth: torch.Tensor) -> None:
    error = ((got - truth).norm() / truth.norm()).item()
    if not error < 1e-5:
        raise SystemExit(f"{name} is wrong: relative error {error:.1e}")


def rounds(functions: list[Callable[[], object]]) -> list[list[float]]:
    """Seconds of each function in every round; the first round warms up and is left out."""
    times: list[list[float]] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 6 or time.perf_counter() < end:
        stamps = [time.perf_counter()]
        for function in functions:
            function()
            stamps.append(time.perf_counter())
        times.append([after - before for before, after in pairwise(stamps)])
    return [list(column) for column in zip(*times[1:], strict=True)]


if __name__ == "__main__":
    main()
