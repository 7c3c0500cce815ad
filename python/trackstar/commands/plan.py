"""The command that says what a build and a query would need."""

from pathlib import Path
from typing import Annotated

import typer

from trackstar.commands.options import (
    BlocksOption,
    CorrectionKind,
    CorrectionOption,
    Dtype,
    DtypeOption,
    KindOption,
    ModelOption,
    SketchKind,
    SketchOption,
    WideOption,
    make_spec,
    parse_bytes,
    read_jsonl,
    require_model,
)

QUERY_TOKENS = 32
"""Tokens of a query, prompt and target."""


def plan(
    model: ModelOption,
    examples: Annotated[
        str | None, typer.Option(help="Examples of the corpus, such as 1e6; a thousand to a billion without.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of an example.")] = 256,
    data: Annotated[
        Path | None, typer.Option(help="The corpus itself, as for build, instead of --examples and --tokens.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the store would go: the disk to measure.")] = Path(),
    correction: CorrectionOption = CorrectionKind.none,
    rank: Annotated[int, typer.Option(help="Rank of the rank correction.")] = 1,
    dtype: DtypeOption = Dtype.float16,
    wide: WideOption = None,
    sketch: SketchOption = 16,
    blocks: BlocksOption = "module",
    kind: KindOption = SketchKind.rademacher,
    sample: Annotated[int, typer.Option(help="Examples that R_train is estimated from.")] = 10_000,
    queries: Annotated[int, typer.Option(help="Queries asked at once.")] = 100,
    k: Annotated[int, typer.Option("-k", help="Passages per query.")] = 10,
    memory: Annotated[str, typer.Option(help="What a scan may take.")] = "256MB",
    gpu: Annotated[
        str | None, typer.Option(help="Reckon with the data sheet of H200, H100, A100, L40S or L4.")
    ] = None,
) -> None:
    """Say what a build and a query would need, without weights or building: memory, disk, time."""
    if data is not None and examples is not None:
        raise typer.BadParameter("give --examples or --data, not both")
    for name, value in (("--tokens", tokens), ("--queries", queries), ("-k", k), ("--sample", sample)):
        if value < 1:
            raise typer.BadParameter(f"{name} must be at least 1, got {value}")
    limit = parse_bytes(memory, "--memory")
    counts = [10**power for power in range(3, 10)] if examples is None else [_count(examples)]

    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from trackstar.planning.dry_run import model_of_shapes
    from trackstar.planning.needs import TEXT_BYTES, Corpus, Question
    from trackstar.planning.plan import amount, describe, planned_job
    from trackstar.planning.rates import GPUS, measured_rates
    from trackstar.storage.build import check_dtypes
    from trackstar.storage.durable import nearest_folder

    if gpu is not None and gpu not in GPUS:
        raise typer.BadParameter(f"--gpu must be one of {', '.join(GPUS)}; got {gpu!r}")
    check_dtypes(dtype.value, wide and wide.value)
    spec = make_spec(sketch, blocks, kind)
    require_model(model)
    network = model_of_shapes(model)
    corpora = [Corpus.assumed(count, tokens) for count in counts]
    if data is not None:
        import transformers

        from trackstar.gradients.examples import encode_examples
        from trackstar.gradients.passes import position_limit

        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
        corpora = [Corpus.of(encode_examples(read_jsonl(data, "--data"), tokenizer, position_limit(network)))]
    rates = measured_rates(nearest_folder(out)) if gpu is None else GPUS[gpu]
    question = Question(queries, QUERY_TOKENS, k, limit)
    job = planned_job(
        network,
        spec,
        corpora[0],
        dtype=dtype.value,
        wide=wide and wide.value,
        correction=correction.value,
        rank=rank,
        sample=sample,
        rates=rates,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("examples", "disk", "build: memory", "time", "query: memory", "time", "again"):
        table.add_column(heading, justify="right")
    for corpus in corpora:
        table.add_row(
            f"{corpus.examples:,}", *describe(dataclasses.replace(job, corpus=corpus), question, rates)
        )
    screen = Console(highlight=False, soft_wrap=True)
    screen.print(
        f"{amount(job.weights)} of weights in float32; {job.layout.blocks} blocks of {job.layout.size}, "
        f"{amount(job.layout.row_bytes)} a row"
    )
    screen.print(str(rates))
    if rates.memory is not None:
        screen.print(
            f"on the GPU: {amount(job.device_memory)} of {amount(rates.memory)}, and the scan's buffers"
        )
    screen.print(table)
    known = (
        ""
        if data is not None
        else f"Examples are taken to have {tokens} tokens of {TEXT_BYTES} bytes of text each. "
    )
    screen.print(
        f"{known}Memory is what comes on top of an idle process. A query asks for {queries} targets at once, with "
        f"{QUERY_TOKENS} tokens and k = {k} each: the first one reads the store from disk, the next from memory, "
        "where it fits."
    )


def _count(text: str) -> int:
    """The number that "1000000", "1e6" or "1_000_000" stands for."""
    try:
        count = int(float(text))
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise typer.BadParameter(f"--examples must be a number of at least 1, got {text!r}")
    return count
