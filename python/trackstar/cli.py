"""The command line. Heavy imports wait until a command needs them, so that help is instant."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Trace what a language model says back to its training examples.",
)


class CorrectionKind(StrEnum):
    """Forms of the optimizer correction."""

    none = "none"
    rank = "rank"
    exact = "exact"


class Dtype(StrEnum):
    """Dtypes of stored rows."""

    float16 = "float16"
    float32 = "float32"


class SketchKind(StrEnum):
    """Kinds of random projections: see SketchSpec."""

    rademacher = "rademacher"
    gaussian = "gaussian"
    countsketch = "countsketch"


ModelOption = Annotated[Path, typer.Option("--model", help="Folder of a transformers causal language model.")]
DataOption = Annotated[Path, typer.Option("--data", help='JSONL of {"text": …} or {"input_ids": …}.')]
StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
OptimizerOption = Annotated[
    Path | None,
    typer.Option(
        help="Saved optimizer state for the correction: a torch.save or safetensors file, an index of safetensors "
        "shards, a torch.distributed.checkpoint folder, or a Trainer or accelerate checkpoint."
    ),
]
CorrectionOption = Annotated[CorrectionKind, typer.Option(help="Optimizer correction V^(-1/2).")]
SketchOption = Annotated[
    int, typer.Option(help="p = q: a module's gradient becomes sketch × sketch numbers.")
]
KindOption = Annotated[
    SketchKind,
    typer.Option(
        help="Projections; countsketch makes the exact correction nearly free of the sketch's size."
    ),
]
BlocksOption = Annotated[str, typer.Option(help='"module", or a number of layer blocks.')]


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
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the stored rows.")] = Dtype.float16,
    sketch: SketchOption = 16,
    blocks: BlocksOption = "module",
    kind: KindOption = SketchKind.rademacher,
    sample: Annotated[int, typer.Option(help="Examples that R_train is estimated from.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the projections.")] = 0,
) -> None:
    """Encode a corpus into a store, once; every later query is one scan of it."""
    from trackstar.build import build_store

    spec = _spec(seed, sketch, blocks, kind)
    examples = _read_jsonl(data, "--data")
    network, tokenizer = _load_model(model)
    chosen = _correction(network, tokenizer, examples, optimizer, correction, rank, estimate)
    store = build_store(
        out,
        network,
        examples,
        tokenizer=tokenizer,
        spec=spec,
        correction=chosen,
        dtype=dtype.value,
        sample=sample,
    )
    typer.echo(f"{store}")


@app.command()
def query(
    store: StoreArgument,
    model: ModelOption,
    prompt: Annotated[str | None, typer.Option(help="What the model was given.")] = None,
    target: Annotated[
        str | None, typer.Option(help="What it said; give the space before it, if any.")
    ] = None,
    queries: Annotated[Path | None, typer.Option(help='JSONL of {"prompt": …, "target": …}.')] = None,
    k: Annotated[int, typer.Option("-k", help="Passages per query.")] = 10,
    mixing: Annotated[
        str, typer.Option(help='λ from 0 to below 1, or "auto" for the paper\'s rule.')
    ] = "auto",
    opponents: Annotated[bool, typer.Option("--opponents", help="Also the lowest scores.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the results as JSONL for the paper's viewer.")
    ] = None,
) -> None:
    """Show which passages most influenced the model's giving a target after a prompt."""
    if (queries is None) == (prompt is None) or (prompt is None) != (target is None):
        raise typer.BadParameter("give --prompt and --target, or --queries")
    share: str | float = mixing
    if mixing != "auto":
        try:
            share = float(mixing)
        except ValueError:
            raise typer.BadParameter(f'--mixing must be "auto" or a number, got {mixing!r}') from None

    from trackstar.attribution import Result, query_rows, score_rows
    from trackstar.examples import encode_queries
    from trackstar.report import print_result
    from trackstar.store import open_store

    opened = open_store(store)
    asked = [{"prompt": prompt, "target": target}] if queries is None else _read_jsonl(queries, "--queries")
    network, tokenizer = _load_model(model)
    encoded = encode_queries(asked, tokenizer)
    rows = query_rows(opened, network, encoded, tokenizer=tokenizer)
    results = []
    for largest in (True, False) if opponents else (True,):
        scores, indices, used = score_rows(opened, rows, k=k, mixing=share, largest=largest)
        results.append(Result(scores, indices, used, largest, encoded, opened))
        print_result(results[-1])
    if out is not None:
        results[0].to_jsonl(out, opponents=results[1] if opponents else None)
        typer.echo(f"\nwritten: {out}")


@app.command()
def info(store: StoreArgument) -> None:
    """Describe a store."""
    from trackstar.store import open_store

    opened = open_store(store)
    typer.echo(f"{opened}")
    typer.echo(json.dumps(opened.identity, indent=2))


@app.command()
def verify(store: StoreArgument) -> None:
    """Compare every file of a store with its checksum; exit 1 where one is damaged."""
    from trackstar.store import open_store

    opened = open_store(store)
    damage = opened.damage()
    for line in damage:
        typer.echo(line)
    if damage:
        raise typer.Exit(1)
    state = "complete" if opened.complete else "incomplete: run its build again to finish it"
    typer.echo(f"{len(opened)} rows in {len(opened.shards)} shards, all as written; {state}")


@app.command()
def plan(
    model: ModelOption,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Where the store would go.")],
    correction: CorrectionOption = CorrectionKind.none,
    rank: Annotated[int, typer.Option(help="Rank of the rank correction.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the stored rows.")] = Dtype.float16,
    sketch: SketchOption = 16,
    blocks: BlocksOption = "module",
    kind: KindOption = SketchKind.rademacher,
    sample: Annotated[int, typer.Option(help="Examples that R_train is estimated from.")] = 10_000,
) -> None:
    """Say what a build would need, without building: rows, disk, memory, time."""
    from trackstar.collector import GradientCollector
    from trackstar.examples import encode_examples
    from trackstar.lean import LeanPass
    from trackstar.passes import position_limit
    from trackstar.plan import plan_build

    spec = _spec(0, sketch, blocks, kind)
    examples = _read_jsonl(data, "--data")
    network, tokenizer = _load_model(model)
    encoded = encode_examples(examples, tokenizer, position_limit(network))
    chosen = _correction(network, tokenizer, examples[:1], None, correction, rank, 1)
    collector = GradientCollector(network, spec, chosen)
    lean = LeanPass(network, collector.modules.values())
    needs = plan_build(lean, encoded, collector, chosen, dtype.value, min(sample, len(encoded)), out)
    typer.echo(f"{needs}")


def _spec(seed: int, sketch: int, blocks: str, kind: SketchKind) -> Any:
    from trackstar.spec import SketchSpec

    grouping = int(blocks) if blocks.isdigit() else blocks
    return SketchSpec(seed=seed, sketch=sketch, blocks=grouping, kind=kind.value)


def _correction(
    model: Any,
    tokenizer: Any,
    examples: list[dict[str, Any]],
    optimizer: Path | None,
    kind: CorrectionKind,
    rank: int,
    estimate: int,
) -> Any:
    from trackstar.progress import console
    from trackstar.second_moments import SecondMoments

    if kind is CorrectionKind.none:
        if optimizer is not None:
            raise typer.BadParameter("--optimizer needs --correction rank or exact")
        return None
    if optimizer is not None:
        return SecondMoments.from_optimizer(optimizer, model).correction(kind.value, rank=rank)
    sample = examples[:: max(len(examples) // estimate, 1)][:estimate]
    console().print(f"estimating second moments from {len(sample)} examples (no --optimizer was given)")
    return SecondMoments.estimate(model, sample, tokenizer=tokenizer).correction(kind.value, rank=rank)


def _read_jsonl(path: Path, option: str) -> list[dict[str, Any]]:
    lines = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{option}: line {number} of {path} is not JSON: {error}") from None
    if not lines:
        raise ValueError(f"{option} must hold at least one line, {path} is empty")
    return lines


def _load_model(folder: Path) -> tuple[Any, Any]:
    """The model, float32, and the tokenizer in ``folder``; nothing is downloaded."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"--model must be a folder with a transformers model (config.json), got {folder}"
        )
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    return model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def main() -> None:
    """Run a command: exit 0 on success, 2 on bad usage, 1 with one clear line otherwise."""
    import sys

    try:
        app()
    except KeyboardInterrupt:
        typer.echo("trackstar: interrupted; run the same command again to go on", err=True)
        raise SystemExit(130) from None
    except Exception as error:
        from trackstar.manifest import StoreError

        if not isinstance(
            error, OSError | ValueError | TypeError | RuntimeError | FloatingPointError | StoreError
        ):
            raise
        message = " ".join(str(error).split())
        sys.stderr.write(f"trackstar: {message}\n")
        raise SystemExit(1) from None
