"""project_gradients, every form × shape × backend: ``python -m benchmarks.gradient [--quick] [--threads N] [--isa I]``.

Two yardsticks in torch, both into memory that is there already: the bare product ΔᵀX (torch.bmm), which an exact
correction cannot avoid, and the obvious code of the same form. Beside them the floor: the form's arithmetic at the
speed of the processor's multiply-adds (on a GPU, of a large matmul), or its bytes at the speed of memory, whichever
takes longer. Kernels are called as the engine calls them, without the check for finite inputs. Everything is checked
against the float64 definition before it is timed; rounds are interleaved, ratios are medians over rounds.

The same table is made for the CPU and, where there is one, for a CUDA device.
"""

import argparse
from functools import partial
from statistics import median

import torch

from benchmarks.cases import BATCH, FORMS, SKETCHES, Case, Layer, layers
from benchmarks.machine import ceilings, describe, save
from benchmarks.targets import compare
from benchmarks.timing import interleaved, ratio
from trackstar_kernels import _C, available_backends, project_gradients

DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}
PEAK = {
    ("cpu", torch.float32): "multiply-add GFLOP/s",
    ("cuda", torch.bfloat16): "bf16 GFLOP/s",
    ("cuda", torch.float32): "tf32 GFLOP/s",
}
MEMORY = {"cpu": "read GB/s", "cuda": "copy GB/s"}
TOLERANCE = {
    ("cpu", torch.float32): 1e-5,
    ("cuda", torch.bfloat16): 2e-2,  # products of bfloat16 intermediates
    ("cuda", torch.float32): 2e-3,  # tf32 has ten bits
}
"""Largest relative error (Frobenius, over the batch) from the float64 definition on the same inputs."""

HEADER = (
    f"{'O×I':>9} {'T':>4} {'p':>3}  {'form':<18} {'backend':<10} {'ms':>9} {'÷ bmm':>6} {'÷ torch':>7} "
    f"{'GFLOP/s':>8} {'of peak':>7} {'FLOP/B':>7} {'floor ms':>9} {'floor ÷':>7}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--isa", choices=_C.available_isas(), default=_C.isa(), help="level of the CPU kernels"
    )
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _C.set_isa(arguments.isa)
    results = []
    for device in DTYPES:
        if device == "cuda" and not torch.cuda.is_available():
            print("\nThe roofline table of a GPU needs a CUDA device; there is none here.")
            continue
        if device == "cuda":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        for dtype in DTYPES[device]:
            print(f"\n{device}, {dtype}, B = {BATCH}; {describe(device)}\n{HEADER}")
            for layer in layers(dtype, device, arguments.quick):
                results += measure(layer, arguments.rounds)
    targets = compare(worst(results)) if arguments.threads == 1 else []
    print(f"written: {save('gradient', {'grid': results, 'targets': targets})}")


def measure(layer: Layer, rounds: int) -> list[dict[str, object]]:
    """Check every form and backend on one layer, time them, print their lines and return them."""
    tensors = layer.tensors()
    gradients = torch.empty(
        BATCH, layer.out_features, layer.in_features, dtype=layer.dtype, device=layer.device
    )
    results = []
    for sketch in SKETCHES:
        cases = [Case(layer, form, sketch) for form in FORMS]
        given = {case: case.arguments(tensors) for case in cases}
        runs = {"bmm": lambda: torch.bmm(tensors["output_grads"].mT, tensors["activations"], out=gradients)}
        for case in cases:
            runs[case, "torch"] = case.obvious(given[case])
            for backend in timed_backends(layer.device):
                runs[case, backend] = partial(
                    project_gradients, **given[case], backend=backend, check_finite=False
                )
            check(case, given[case], {key[1]: run for key, run in runs.items() if key[0] == case})
        seconds = interleaved(runs, rounds, layer.device)
        for case in cases:
            for backend in timed_backends(layer.device):
                mine = seconds[case, backend]
                figures = roofline(case, given[case], median(mine)) | {
                    "of bmm": ratio(mine, seconds["bmm"]),
                    "of torch": ratio(mine, seconds[case, "torch"]),
                }
                results.append(report(case, backend, figures))
    return results


def timed_backends(device: str) -> list[str]:
    """All of them; but the CPU's reference is there to be checked against, not to be fast."""
    names = available_backends()["project_gradients"][device]
    return [name for name in names if device == "cuda" or name != "reference"]


def check(case: Case, given: dict[str, torch.Tensor], runs: dict[str, object]) -> None:
    """Stop unless all runs agree with the definition in float64."""
    truth = project_gradients(
        **{name: tensor.double() for name, tensor in given.items()}, backend="reference"
    )
    for name, run in runs.items():
        error = ((run() - truth).norm() / truth.norm()).item()
        if not error < TOLERANCE[case.layer.device, case.layer.dtype]:
            raise SystemExit(f"{name} is wrong: relative error {error:.1e}, {case}")


def roofline(case: Case, given: dict[str, torch.Tensor], seconds: float) -> dict[str, float]:
    """The time beside what the machine's measured ceilings allow at best."""
    device, limits = case.layer.device, ceilings(case.layer.device)
    peak, memory = 1e9 * limits[PEAK[device, case.layer.dtype]], 1e9 * limits[MEMORY[device]]
    traffic = case.bytes(given)
    floor = max(case.flops / peak, traffic / memory)
    return {
        "seconds": seconds,
        "GFLOP/s": case.flops / seconds / 1e9,
        "of peak": case.flops / seconds / peak,
        "FLOP/byte": case.flops / traffic,
        "floor": floor,
        "floor of seconds": floor / seconds,
    }


def report(case: Case, backend: str, figures: dict[str, float]) -> dict[str, object]:
    """Print one line; return it for JSON."""
    layer = case.layer
    shape = f"{layer.out_features}×{layer.in_features}"
    print(
        f"{shape:>9} {layer.tokens:>4} {case.sketch:>3}  {case.form:<18} {backend:<10}"
        f" {1e3 * figures['seconds']:>9.3f} {figures['of bmm']:>6.2f} {figures['of torch']:>7.2f}"
        f" {figures['GFLOP/s']:>8.0f} {figures['of peak']:>7.0%} {figures['FLOP/byte']:>7.0f}"
        f" {1e3 * figures['floor']:>9.3f} {figures['floor of seconds']:>7.0%}",
        flush=True,
    )
    place = {"device": layer.device, "dtype": str(layer.dtype).removeprefix("torch."), "backend": backend}
    return place | {"O×I": shape, "T": layer.tokens, "p": case.sketch, "form": case.form} | figures


def worst(results: list[dict[str, object]]) -> dict[str, float]:
    """The CPU's ratios to bmm that have targets, each at its worst shape."""
    cpu = [r for r in results if r["device"] == "cpu"]
    dense = [r["of bmm"] for r in cpu if r["form"] == "exact" and (r["T"], r["p"]) == (512, 16)]
    sparse = [r["of bmm"] for r in cpu if r["form"] == "exact countsketch"]
    return {
        "exact ÷ bmm, T 512 p 16, worst shape": max(dense),
        "exact countsketch ÷ bmm, worst of all": max(sparse),
    }


if __name__ == "__main__":
    main()
