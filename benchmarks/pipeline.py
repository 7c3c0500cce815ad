"""What a store's rows cost beside a training step: ``python -m benchmarks.pipeline [--case A] [--sketch 16]``.

Lines: "full", forward and backward with all weight gradients, as an ordinary loop has them; "frozen", the same with
only the embedding requiring one; "matmuls", the products alone that the engine's pass cannot avoid, into memory that is
there already; "lean", the engine's own pass with taps that do nothing; then rows under every correction, each checked
against the definition before it is timed.
"""

import argparse
from functools import partial

import torch
import transformers
from torch import nn
from trackstar.gradients.collector import GradientCollector
from trackstar.gradients.examples import Encoded
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.modules import select_weights
from trackstar.gradients.passes import BATCH_TOKENS, rows_of
from trackstar.gradients.spec import SketchSpec
from trackstar.gradients.tap import GradientTap
from trackstar.optimizer.correction import Correction
from trackstar.optimizer.second_moments import SecondMoments

from benchmarks.machine import describe, save
from benchmarks.models import CASES, training_step
from benchmarks.targets import compare
from benchmarks.timing import Run, excess, interleaved, ratio, summary

TOLERANCE = 1e-4  # relative, Frobenius, of an example's row: both sides are float32 passes of one model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--sketch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    print(describe())
    for name in arguments.case:
        lines = measure(name, arguments.sketch, arguments.rounds)
        targets = compare(reached(name, lines)) if arguments.threads == 1 else []
        print(f"written: {save(f'pipeline-{name}', {'lines': lines, 'targets': targets})}")


def measure(name: str, sketches: list[int], rounds: int) -> dict[str, dict[str, object]]:
    """Check and time one model, print its table and return the lines."""
    case = CASES[name]
    model, ids = case.model(), case.ids()
    batch = as_examples(ids)
    seconds = interleaved(
        {
            "full": lambda: training_step(model, ids),
            "frozen": lambda: training_step(model, ids, frozen=True),
            "matmuls": matmuls(model, ids.numel()),
            "lean": lean(model, batch),
            **collections(model, ids, batch, sketches),
        },
        rounds,
    )
    print(f"\n{name}: {case.description}")
    print(f"{'':<22} {'seconds':>8} {'p20–p80':>13} {'÷ full':>7} {'÷ frozen':>8} {'above lean':>10}")
    lines = {}
    for line, measured in seconds.items():
        figures = summary(measured)
        of_full, of_frozen = (ratio(measured, seconds[base]) for base in ("full", "frozen"))
        above = excess(measured, seconds["lean"], seconds["full"])
        spread = f"{figures['p20']:.3f}–{figures['p80']:.3f}"
        print(
            f"{line:<22} {figures['median']:>8.3f} {spread:>13} {of_full:>7.3f} {of_frozen:>8.3f} {above:>10.3f}"
        )
        lines[line] = {
            "seconds": figures,
            "of full": of_full,
            "of frozen": of_frozen,
            "above lean": above,
        }
    return lines


def as_examples(ids: torch.Tensor) -> list[Encoded]:
    return [Encoded(str(i), "", row, row) for i, row in enumerate(ids.int().numpy())]


def lean(model: nn.Module, batch: list[Encoded]) -> Run:
    """The engine's own pass, in the batches that rows_of forms, which shows every gradient to nobody."""
    weights = select_weights(model)
    one = LeanPass(model, [weight.module for weight in weights.values()])
    lengths = [len(example) for example in batch]
    parts = [[batch[i] for i in part] for part in one.batches(lengths, BATCH_TOKENS)]

    def run() -> None:
        with one, GradientTap(weights, lambda use: None):
            for part in parts:
                one.run(one.arrange(part))

    return run


def matmuls(model: nn.Module, tokens: int) -> Run:
    """Every linear layer's product forward, and backward where something before it is captured; no attention."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    widths = {width for module in linear.values() for width in module.weight.shape}
    given = {width: torch.randn(tokens, width) for width in widths}
    out = {width: torch.empty(tokens, width) for width in widths}
    factors = []
    for name, module in linear.items():
        weight = module.weight.detach()
        factors.append(weight.T)
        if not name.endswith(tuple(f"layers.0.self_attn.{which}_proj" for which in "qkv")):
            factors.append(weight)

    def run() -> None:
        for factor in factors:
            torch.mm(given[factor.shape[0]], factor, out=out[factor.shape[1]])

    return run


def corrections(model: nn.Module, ids: torch.Tensor) -> dict[str, tuple[str, Correction | None]]:
    """Kind of sketch and correction of every form, with second moments of the batch itself."""
    second = SecondMoments.estimate(model, [{"input_ids": row} for row in ids.tolist()])
    exact = second.correction("exact")
    return {
        "none": ("rademacher", None),
        "rank-1": ("rademacher", second.correction("rank", rank=1)),
        "rank-4": ("rademacher", second.correction("rank", rank=4)),
        "exact": ("rademacher", exact),
        "exact countsketch": ("countsketch", exact),
    }


def collections(
    model: nn.Module, ids: torch.Tensor, batch: list[Encoded], sketches: list[int]
) -> dict[str, Run]:
    """Rows of the batch under every correction and sketch, checked."""
    gradients = {i: full_gradients(model, ids[i : i + 1]) for i in (0, len(ids) - 1)}
    forms = corrections(model, ids)
    one = LeanPass(model, [weight.module for weight in select_weights(model).values()])
    runs = {}
    for sketch in sketches:
        for form, (kind, correction) in forms.items():
            spec = SketchSpec(sketch=sketch, kind=kind)
            run = partial(rows_of, one, batch, GradientCollector(model, spec, correction))
            rows = run().double()
            for i, whole in gradients.items():
                wanted = define(whole, spec, correction)
                error = ((rows[i] - wanted).norm() / wanted.norm()).item()
                if not error < TOLERANCE:
                    raise SystemExit(f"{form} p{sketch} is wrong: example {i} has relative error {error:.1e}")
            runs[f"{form} p{sketch}"] = run
    return runs


def full_gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """{module: ∇ of one example's summed loss (O, I)}, from an ordinary backward pass."""
    training_step(model, ids)
    predictions = ids.shape[1] - 1  # the loop's loss is a mean over them
    return {
        name: weight.module.weight.grad.double() * predictions
        for name, weight in select_weights(model).items()
    }


def define(
    gradients: dict[str, torch.Tensor], spec: SketchSpec, correction: Correction | None
) -> torch.Tensor:
    """The row (L, d) in float64: correct every gradient, then project it from both sides."""
    blocks = []
    for name, gradient in gradients.items():
        left, right = spec.projections(name, *reversed(gradient.shape))
        if correction is not None and correction.kind == "exact":
            gradient = gradient * correction.scales[name]
        elif correction is not None:
            u, v = correction.factors[name]
            gradient = gradient * (u.T.double() @ v.double())
        blocks.append((left.double() @ gradient @ right.double().T).flatten())
    return torch.stack(blocks)


def reached(name: str, lines: dict[str, dict[str, object]]) -> dict[str, float]:
    """The case's ratios that have targets, as far as they were measured."""
    found = {f"lean ÷ full, {name}": lines["lean"]["of full"]}
    if "none p16" in lines:
        for form in ("none", "rank-1", "rank-4"):
            found[f"{form} p16 above lean, {name}"] = lines[f"{form} p16"]["above lean"]
        found[f"exact p16 ÷ full, {name}"] = lines["exact p16"]["of full"]
    if name == "A" and "exact p64" in lines:
        either = (lines[f"{form} p64"]["of full"] for form in ("exact", "exact countsketch"))
        found["exact p64 ÷ full, A, the better sketch"] = min(either)
    return found


if __name__ == "__main__":
    main()
