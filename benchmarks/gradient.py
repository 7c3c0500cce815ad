"""project_gradients against the bare per-example gradient, and against the obvious torch code.

    python -m benchmarks.gradient [--threads N]

The baseline is the matmul that an exact correction cannot avoid, torch.bmm(ΔᵀX), into memory that is already
there; "torch" goes on to scale it and project it. Everything is checked against the float64 reference before
it is timed. Rounds are interleaved, and ratios are medians over rounds.
"""

import argparse
from statistics import median

import torch

from benchmarks.timing import ceilings, interleaved, ratio, save
from trackstar_kernels import _C, project_gradients

BATCH = 8
SHAPES = [(768, 768), (2048, 768), (768, 2048), (576, 1536), (192, 576)]  # O, I
TOKENS = [16, 128, 512]
SKETCHES = [16, 64]


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark project_gradients on the CPU.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    limits = ", ".join(f"{value:.0f} {name}" for name, value in ceilings().items())
    print(f"{_C.isa()}, {torch.get_num_threads()} thread(s), {limits}; B = {BATCH}, p = q")
    print("                      time / time of bmm        GFLOP/s")
    print("       O×I    T   p    exact   torch  no scale    exact")
    cases = [
        measure(*shape, tokens, sketch, arguments.rounds)
        for shape in SHAPES
        for tokens in TOKENS
        for sketch in SKETCHES
    ]
    print(f"written: {save('gradient', cases)}")


def measure(out_features, in_features, tokens, sketch, rounds) -> dict[str, object]:
    """Check one shape, time it, print its line and return it."""
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

    seconds = interleaved({"bmm": bmm, "exact": exact, "torch": obvious, "no scale": unscaled}, rounds)
    ratios = {name: ratio(seconds[name], seconds["bmm"]) for name in ("exact", "torch", "no scale")}
    flops = 2 * BATCH * out_features * (in_features * (tokens + sketch) + sketch * sketch)
    speed = flops / median(seconds["exact"]) / 1e9
    shape = f"{out_features}×{in_features}"
    columns = f"{ratios['exact']:>8.2f} {ratios['torch']:>7.2f} {ratios['no scale']:>9.2f} {speed:>8.0f}"
    print(f"{shape:>10} {tokens:>4} {sketch:>3} {columns}", flush=True)
    return {"O×I": shape, "T": tokens, "p": sketch, "of bmm": ratios, "GFLOP/s": speed}


def check(name: str, got: torch.Tensor, truth: torch.Tensor) -> None:
    error = ((got - truth).norm() / truth.norm()).item()
    if not error < 1e-5:
        raise SystemExit(f"{name} is wrong: relative error {error:.1e}")


if __name__ == "__main__":
    main()
