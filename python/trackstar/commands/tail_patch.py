"""The command that takes a training step on every proponent and looks at the answers."""

from pathlib import Path
from typing import Annotated

import typer

from trackstar.commands.options import ModelOption, load_model, read_jsonl

TOP = (1, 3, 5, 10)
"""Proponents that the change is averaged over."""


def tail_patch(
    model: ModelOption,
    optimizer: Annotated[
        Path, typer.Option(help="Saved state of Adam or AdamW: a torch.save file, or a checkpoint's folder.")
    ],
    results: Annotated[Path, typer.Option(help="Results with their passages, as query --out writes them.")],
    lr: Annotated[float | None, typer.Option(help="Learning rate; the saved state's without.")] = None,
    reduction: Annotated[str, typer.Option(help="Loss of a passage: mean or sum over its tokens.")] = "mean",
    momentum: Annotated[
        bool,
        typer.Option(help="Without, the saved first moment is forgotten: the step is the passage's alone."),
    ] = True,
    clip: Annotated[float | None, typer.Option(help="Largest norm of a step's gradient.")] = None,
    processes: Annotated[int, typer.Option(help="Processes that take steps at the same time.")] = 1,
    keep: Annotated[
        Path | None, typer.Option(help="Keep each step's outcome here; a stopped run goes on.")
    ] = None,
) -> None:
    """Take one optimizer step on each proponent, each from the model as it is: how much likelier is the answer?"""
    from trackstar.evaluation.tail_patch import tail_patch as patch

    lines = read_jsonl(results, "--results")
    for number, line in enumerate(lines, start=1):
        if not {"inputs_plaintext", "targets_plaintext", "proponents"} <= line.keys():
            raise ValueError(f"--results must be what query --out writes; line {number} has no proponents")
    network, tokenizer = load_model(model)
    found = patch(
        network,
        optimizer,
        [{"prompt": line["inputs_plaintext"], "target": line["targets_plaintext"]} for line in lines],
        [[{"text": text} for text in line["proponents"]] for line in lines],
        tokenizer=tokenizer,
        lr=lr,
        reduction=reduction,
        momentum=momentum,
        clip=clip,
        processes=processes,
        keep=keep,
    )
    most = found.after.shape[1]
    typer.echo(f"{len(lines)} queries; mean change in the target's probability, in hundredths:")
    for k in sorted({min(k, most) for k in TOP}):
        typer.echo(f"  over the first {k:2d}: {100 * found.gain(k).mean():+.4f}")
    idle = (found.idle.exp() - found.before.exp()).mean()
    typer.echo(f"  no passage (momentum and weight decay alone): {100 * idle:+.4f}")
