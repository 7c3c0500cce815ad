"""The commands of EK-FAC influence functions. Heavy imports wait until a command needs them."""

from pathlib import Path
from typing import Annotated

import typer

from trackstar.commands.options import (
    DataOption,
    ModelOption,
    ModulesOption,
    load_model,
    parse_bytes,
    read_jsonl,
)


def factors(
    model: ModelOption,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder of the factors; a fit that was stopped there goes on.")],
    modules: ModulesOption = None,
    biases: Annotated[bool, typer.Option("--biases", help="Take each bias as one more column.")] = False,
    sample: Annotated[int, typer.Option(help="Examples to fit on.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the labels drawn from the model.")] = 0,
) -> None:
    """Fit EK-FAC's factors of a model's curvature, once; every later influence uses them."""
    from trackstar.ekfac import fit_factors

    examples = read_jsonl(data, "--data")
    network, tokenizer = load_model(model)
    fitted = fit_factors(
        out,
        network,
        examples,
        tokenizer=tokenizer,
        modules=modules or None,
        biases=biases,
        seed=seed,
        sample=sample,
    )
    typer.echo(f"{fitted}")


def influence(
    factors: Annotated[Path, typer.Argument(metavar="FACTORS", help="Folder of the factors.")],
    model: ModelOption,
    data: DataOption,
    prompt: Annotated[str | None, typer.Option(help="What the model was given.")] = None,
    target: Annotated[
        str | None, typer.Option(help="What it said; give the space before it, if any.")
    ] = None,
    queries: Annotated[Path | None, typer.Option(help='JSONL of {"prompt": …, "target": …}.')] = None,
    k: Annotated[int, typer.Option("-k", help="Passages per query.")] = 10,
    rank: Annotated[int, typer.Option(help="Rank that queries are reduced to in each module.")] = 32,
    damping: Annotated[float, typer.Option(help="λ relative to the mean eigenvalue of a module.")] = 0.1,
    candidates: Annotated[
        int, typer.Option(help="Of a larger corpus, passages that TF-IDF leaves to each query; 0 for all.")
    ] = 10_000,
    rescored: Annotated[
        int, typer.Option(help="Passages per query that are scored anew at full rank.")
    ] = 100,
    opponents: Annotated[bool, typer.Option("--opponents", help="The lowest scores instead.")] = False,
    memory: Annotated[str, typer.Option(help="What reduced queries take at most, such as 1GB.")] = "1GB",
    out: Annotated[
        Path | None, typer.Option(help="Write the results as JSONL for the paper's viewer.")
    ] = None,
) -> None:
    """Show which passages most influenced the model's giving a target after a prompt, by EK-FAC."""
    if (queries is None) == (prompt is None) or (prompt is None) != (target is None):
        raise typer.BadParameter("give --prompt and --target, or --queries")
    limit = parse_bytes(memory, "--memory")

    from trackstar.ekfac import influence as influences
    from trackstar.ekfac import open_factors
    from trackstar.scoring.report import print_result

    opened = open_factors(factors)
    asked = [{"prompt": prompt, "target": target}] if queries is None else read_jsonl(queries, "--queries")
    examples = read_jsonl(data, "--data")
    network, tokenizer = load_model(model)
    result = influences(
        opened,
        network,
        examples,
        asked,
        tokenizer=tokenizer,
        k=k,
        rank=rank,
        damping=damping,
        candidates=candidates or None,
        rescored=rescored,
        largest=not opponents,
        memory=limit,
    )
    print_result(result)
    if out is not None:
        result.to_jsonl(out)
        typer.echo(f"\nwritten: {out}")


COMMANDS = (factors, influence)
