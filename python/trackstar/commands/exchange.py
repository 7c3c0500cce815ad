"""The commands that take in and hand out what other tools use. Heavy imports wait until a command needs them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from trackstar.commands.options import Dtype, DtypeOption, StoreArgument, WideOption, read_jsonl


class Exported(StrEnum):
    """Dtypes of exported rows."""

    float32 = "float32"
    float16 = "float16"


def import_(
    source: Annotated[Path, typer.Argument(metavar="BERGSON", help="Folder of a bergson gradient index.")],
    out: Annotated[Path, typer.Option(help="Folder of the new store; an import stopped there goes on.")],
    data: Annotated[
        Path | None, typer.Option(help="JSONL of the documents, in the index's order: ids and texts to show.")
    ] = None,
    dtype: DtypeOption = Dtype.float16,
    wide: WideOption = None,
) -> None:
    """Make a store of the rows of a bergson index, whitened by their own R_train."""
    from trackstar.exchange.bergson import import_bergson

    examples = None if data is None else read_jsonl(data, "--data")
    store = import_bergson(source, out, examples=examples, dtype=dtype.value, wide=wide and wide.value)
    typer.echo(f"{store}")


def export(
    store: StoreArgument,
    out: Annotated[Path, typer.Option(help="File to write: .parquet, .arrow (Arrow IPC) or .npy.")],
    dtype: Annotated[Exported, typer.Option(help="Dtype of the numbers.")] = Exported.float32,
) -> None:
    """Write a store's whitened rows, with ids, texts and metadata, to one file."""
    from trackstar.exchange.export import export_rows
    from trackstar.storage.store import open_store

    count = export_rows(open_store(store), out, dtype=dtype.value)
    typer.echo(f"{out}: {count} rows")


def show(
    results: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Results in the viewer's format.")],
) -> None:
    """Print results that were written as JSONL, by this or another tool."""
    from trackstar.exchange.viewer import read_jsonl_results
    from trackstar.scoring.report import print_result

    result = read_jsonl_results(results)
    print_result(result)
    if result.opponents is not None:
        print_result(result.opponents)


COMMANDS = (import_, export, show)
