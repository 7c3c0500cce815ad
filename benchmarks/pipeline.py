"""What a store's rows cost beside a plain training step: ``python -m benchmarks.pipeline``.

A Llama (hidden 768, 2 layers) over batches of 8 × 128 tokens. Baselines: forward and backward with all weight
gradients ("full"), and the same with only the embedding requiring one ("frozen"). Every correction is checked
against the definition before it is timed.
"""

import argparse

import torch
import transformers
from rich.console import Console
from rich.table import Table
from trackstar.collector import GradientCollector
from trackstar.correction import Correction
from trackstar.examples import Encoded
from trackstar.losses import nll
from trackstar.modules import select_modules
from trackstar.passes import rows_of
from trackstar.second_moments import SecondMoments
from trackstar.spec import SketchSpec

from benchmarks.timing import interleaved, machine, ratio, save, summary

BATCH, TOKENS = 8, 128


def make_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=TOKENS,
    )
    return transformers.LlamaForCausalLM(config).eval()


def make_batch():
    ids = torch.randint(0, 8192, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    return [
        Encoded(str(i), "", row.numpy().astype("int32"), row.numpy().astype("int32"))
        for i, row in enumerate(ids)
    ]


def training_step(model, batch, frozen):
    """Forward and backward as a training loop has it."""
    ids = torch.stack([torch.from_numpy(example.tokens).long() for example in batch])
    embedding = model.get_input_embeddings().weight
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen or parameter is embedding)
        parameter.grad = None
    nll(model(input_ids=ids, use_cache=False).logits, ids).backward()


def check(model, batch, spec, correction: Correction | None):
    """Compare one example's row with the definition: every weight gradient, corrected, then sketched."""
    training_step(model, batch[:1], frozen=False)
    wanted = []
    for name, module in select_modules(model).items():
        gradient = module.weight.grad.double()
        if correction is not None:
            exact = correction.scales.get(name)
            gradient = gradient * (
                correction.factors[name][0].T @ correction.factors[name][1] if exact is None else exact
            )
        left, right = spec.projections(name, gradient.shape[1], gradient.shape[0])
        wanted.append((left.double() @ gradient @ right.double().T).flatten())
    got = rows_of(model, batch, GradientCollector(model, spec, correction))[0].double()
    error = (got - torch.stack(wanted)).norm() / torch.stack(wanted).norm()
    if error > 2e-4:
        raise SystemExit(f"rows differ from the definition by {error:.2e}: not timing a wrong result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sketch", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    model, batch, spec = make_model(), make_batch(), SketchSpec(sketch=arguments.sketch)
    second = SecondMoments.estimate(model, [{"input_ids": example.tokens.tolist()} for example in batch])
    corrections = {
        "none": None,
        "rank-1": second.correction("rank", rank=1),
        "rank-4": second.correction("rank", rank=4),
        "exact": second.correction("exact"),
    }
    for correction in corrections.values():
        check(model, batch, spec, correction)
    collectors = {
        name: GradientCollector(model, spec, correction) for name, correction in corrections.items()
    }

    def collect(collector):
        return lambda: rows_of(model, batch, collector)

    candidates = {
        "full": lambda: training_step(model, batch, frozen=False),
        "frozen": lambda: training_step(model, batch, frozen=True),
    } | {name: collect(collector) for name, collector in collectors.items()}
    seconds = interleaved(candidates, arguments.rounds)
    table = Table(
        title=f"Llama h768/2L, {BATCH}×{TOKENS}, p={arguments.sketch}, {arguments.threads} thread(s)"
    )
    for column in ("case", "seconds", "p20–p80", "÷ full", "÷ frozen"):
        table.add_column(column, justify="right" if column != "case" else "left")
    cases = []
    for name, measured in seconds.items():
        stats = summary(measured)
        against = [ratio(measured, seconds[base]) for base in ("full", "frozen")]
        spread = f"{stats['p20']:.3f}–{stats['p80']:.3f}"
        table.add_row(name, f"{stats['median']:.3f}", spread, f"{against[0]:.3f}", f"{against[1]:.3f}")
        cases.append({"case": name, "seconds": stats, "of full": against[0], "of frozen": against[1]})
    console = Console()
    console.print(table)
    console.print(machine())
    console.print(f"written: {save('pipeline', cases)}")


if __name__ == "__main__":
    main()
