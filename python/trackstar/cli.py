"""The command line. Heavy imports wait until a command needs them, so that help is instant."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from trackstar.commands import evaluate, exchange, factors, plan, stores, tail_patch
from trackstar.commands.options import (
    AlsoOption,
    BlocksOption,
    CorrectionKind,
    CorrectionOption,
    DataOption,
    Dtype,
    DtypeOption,
    KindOption,
    MethodName,
    ModelOption,
    ModulesOption,
    OptimizerOption,
    Output,
    SketchKind,
    SketchOption,
    StoreArgument,
    WideOption,
    load_model,
    make_spec,
    parse_bytes,
    parse_checkpoint,
    parse_condition,
    parse_range,
    read_jsonl,
    silence_transformers,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Trace what a language model says back to its training examples.",
)


@app.command()
def build(
    model: ModelOption,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder of the store; a build that was stopped there goes on.")],
    optimizer: OptimizerOption = None,
    correction: CorrectionOption = CorrectionKind.none,
    rank: Annotated[int, typer.Option(help="Rank of the rank correction.")] = 1,
    estimate: Annotated[
        int, typer.Option(help="Examples to estimate second moments from, where no optimizer state is given.")
    ] = 128,
    dtype: DtypeOption = Dtype.float16,
    wide: WideOption = None,
    sketch: SketchOption = 16,
    blocks: BlocksOption = "module",
    kind: KindOption = SketchKind.rademacher,
    modules: ModulesOption = None,
    also: AlsoOption = None,
    sample: Annotated[int, typer.Option(help="Examples that R_train is estimated from.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the projections.")] = 0,
    output: Annotated[Output, typer.Option(help="What a row is the gradient of.")] = Output.loss,
) -> None:
    """Encode a corpus into a store, once; every later query is one scan of it."""
    from trackstar.storage.build import build_store

    spec = make_spec(sketch, blocks, kind, seed, modules, also)
    examples = read_jsonl(data, "--data")
    network, tokenizer = load_model(model)
    chosen = _correction(network, tokenizer, examples, spec, optimizer, correction, rank, estimate)
    store = build_store(
        out,
        network,
        examples,
        tokenizer=tokenizer,
        spec=spec,
        correction=chosen,
        output=output.value,
        dtype=dtype.value,
        wide=wide and wide.value,
        sample=sample,
    )
    typer.echo(f"{store}")


@app.command()
def query(
    store: StoreArgument,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of the model that the store was built with; bm25 and dense need none."),
    ] = None,
    method: Annotated[
        MethodName, typer.Option(help="What to score by: see docs/methods.md.")
    ] = MethodName.trackstar,
    prompt: Annotated[str | None, typer.Option(help="What the model was given.")] = None,
    target: Annotated[
        str | None, typer.Option(help="What it said; give the space before it, if any.")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help='JSONL of {"prompt": …, "target": …} and the like.')
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Passages per query.")] = 10,
    mixing: Annotated[
        str, typer.Option(help='λ of trackstar from 0 to below 1, or "auto" for the paper\'s rule.')
    ] = "auto",
    task: Annotated[
        Path | None,
        typer.Option(help="JSONL of other queries that make R_eval, in place of those that are asked."),
    ] = None,
    opponents: Annotated[bool, typer.Option("--opponents", help="Also the lowest scores.")] = False,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Show the layer blocks that each score mostly comes from.")
    ] = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Show the passages' tokens that each score mostly comes from.")
    ] = False,
    rows: Annotated[str | None, typer.Option(metavar="A:B", help="Look at rows A ≤ i < B alone.")] = None,
    ids: Annotated[Path | None, typer.Option(help="Look at the ids in this file alone, one a line.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=PATTERN",
            help='Look at examples alone whose "id" or metadata field matches the shell pattern; may be given often.',
        ),
    ] = None,
    memory: Annotated[str, typer.Option(help="What the scan takes at most, such as 64MB or 2GB.")] = "256MB",
    rescore: Annotated[
        bool,
        typer.Option(
            "--rescore/--no-rescore", help="Answer from the wider copy of narrow rows, where there is one."
        ),
    ] = True,
    companion: Annotated[
        Path | None,
        typer.Option(
            help="Store of the same examples with the rows that the method scores, where STORE's are others: "
            "built if missing, and used from then on. Default: STORE.uncorrected, STORE.margin."
        ),
    ] = None,
    factors: Annotated[Path | None, typer.Option(help="Folder of EK-FAC's factors, for ekfac.")] = None,
    encoder: Annotated[
        Path | None, typer.Option(help="Folder of a sentence-transformers model, for dense.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Learning rate at STORE's checkpoint, for tracin.")] = 1.0,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STORE:MODEL:RATE",
            help="Another checkpoint's store of the same examples, model and learning rate, for tracin; may be given "
            "often.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the results as JSONL for the paper's viewer.")
    ] = None,
) -> None:
    """Show which passages most influenced the model's giving a target after a prompt."""
    if model is None and method not in (MethodName.bm25, MethodName.dense):
        raise typer.BadParameter(f"--model is needed with --method {method.value}")
    if (rate != 1 or checkpoint) and method is not MethodName.tracin:
        raise typer.BadParameter(f"--rate and --checkpoint are for --method tracin, not {method.value}")
    if (blocks or tokens or task or mixing != "auto") and method is MethodName.tracin:
        raise typer.BadParameter("--blocks, --tokens, --task and --mixing are not for --method tracin")
    others = [parse_checkpoint(text, "--checkpoint") for text in checkpoint or []]
    if (queries is None) == (prompt is None) or (prompt is None) != (target is None):
        raise typer.BadParameter("give --prompt and --target, or --queries")
    share: str | float = mixing
    if mixing != "auto":
        try:
            share = float(mixing)
        except ValueError:
            raise typer.BadParameter(f'--mixing must be "auto" or a number, got {mixing!r}') from None
    limit = parse_bytes(memory, "--memory")
    first, end = parse_range(rows, "--rows")
    conditions = [parse_condition(condition, "--where") for condition in where or []]

    from trackstar.scoring.attribution import attribute
    from trackstar.scoring.checkpoints import tracin
    from trackstar.scoring.companion import companion_store
    from trackstar.scoring.report import print_result
    from trackstar.scoring.selection import matching, select
    from trackstar.storage.store import open_store

    opened = open_store(store)
    chosen = select(
        opened,
        range(first, opened.end if end is None else end),
        None if ids is None else ids.read_text(encoding="utf-8").splitlines(),
        *(matching(field, pattern) for field, pattern in conditions),
    )
    asked = [{"prompt": prompt, "target": target}] if queries is None else read_jsonl(queries, "--queries")
    if encoder is not None:
        silence_transformers()
    network, tokenizer = (None, None) if model is None else load_model(model)
    if network is not None:
        opened = companion_store(opened, network, method.value, tokenizer=tokenizer, path=companion)

    def checkpoints() -> Iterator[tuple[Any, Any, float]]:
        yield opened, network, rate
        for store, model, its_rate in others:
            another, _ = load_model(model)
            yield (
                companion_store(open_store(store), another, "tracin", tokenizer=tokenizer),
                another,
                its_rate,
            )

    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "k": k,
        "opponents": opponents,
        "where": chosen,
        "memory": limit,
    }
    if method is MethodName.tracin:
        result = tracin(checkpoints(), asked, **options)
    else:
        result = attribute(
            opened,
            network,
            asked,
            method=method.value,
            mixing=share,
            task=None if task is None else read_jsonl(task, "--task"),
            factors=factors,
            encoder=encoder,
            by_block=blocks,
            by_token=tokens,
            rescore=rescore,
            **options,
        )
    print_result(result, tokenizer=tokenizer)
    if result.opponents is not None:
        print_result(result.opponents, tokenizer=tokenizer)
    if out is not None:
        result.to_jsonl(out)
        typer.echo(f"\nwritten: {out}")


@app.command()
def info(
    store: StoreArgument,
    curvature: Annotated[
        bool,
        typer.Option("--curvature", help="Its R_train instead: ranks, spectrum, outliers. Reads all rows."),
    ] = False,
) -> None:
    """Describe a store."""
    from trackstar.storage.store import open_store

    opened = open_store(store)
    typer.echo(f"{opened}")
    if curvature:
        from trackstar.spectrum import print_spectrum, spectrum_of

        print_spectrum(spectrum_of(opened))
        return
    typer.echo(json.dumps(opened.identity | {"data": opened.parts}, indent=2))


for command in (
    plan.plan,
    evaluate.evaluate,
    tail_patch.tail_patch,
    *stores.COMMANDS,
    *factors.COMMANDS,
    *exchange.COMMANDS,
):
    app.command(command.__name__.rstrip("_").replace("_", "-"))(command)


def _correction(
    model: Any,
    tokenizer: Any,
    examples: list[dict[str, Any]],
    spec: Any,
    optimizer: Path | None,
    kind: CorrectionKind,
    rank: int,
    estimate: int,
) -> Any:
    from trackstar.optimizer.second_moments import SecondMoments
    from trackstar.progress import console

    if kind is CorrectionKind.none:
        if optimizer is not None:
            raise typer.BadParameter("--optimizer needs --correction rank or exact")
        return None
    if optimizer is not None:
        moments = SecondMoments.from_optimizer(optimizer, model, spec=spec)
        return moments.correction(kind.value, rank=rank)
    sample = examples[:: max(len(examples) // estimate, 1)][:estimate]
    console().print(f"estimating second moments from {len(sample)} examples (no --optimizer was given)")
    moments = SecondMoments.estimate(model, sample, tokenizer=tokenizer, spec=spec)
    return moments.correction(kind.value, rank=rank)


def main() -> None:
    """Run a command: exit 0 on success, 2 on bad usage, 1 with one clear line otherwise."""
    import sys

    from trackstar.gradients.heap import give_back_large_blocks

    give_back_large_blocks()
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("trackstar: interrupted; run the same command again to go on", err=True)
        raise SystemExit(130) from None
    except Exception as error:
        from trackstar.errors import StoreError

        if not isinstance(
            error, OSError | ValueError | TypeError | RuntimeError | FloatingPointError | StoreError
        ):
            raise
        message = " ".join(str(error).split())
        sys.stderr.write(f"trackstar: {message}\n")
        raise SystemExit(1) from None
