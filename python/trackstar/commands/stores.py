"""The commands that look after stores. Heavy imports wait until a command needs them."""

from pathlib import Path
from typing import Annotated

import typer

from trackstar.commands.options import (
    DataOption,
    Dtype,
    ModelOption,
    StoreArgument,
    WideOption,
    load_model,
    read_jsonl,
)

OutOption = Annotated[
    Path, typer.Option("--out", help="Folder of the new store; work stopped there goes on.")
]


def verify(
    store: StoreArgument,
    sample: Annotated[float, typer.Option(help="Share of the shards to read, from 0 to 1.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of their choice.")] = 0,
) -> None:
    """Compare every file of a store with its checksum; exit 1 where one is damaged."""
    from trackstar.storage.store import open_store
    from trackstar.storage.verify import verify_store

    opened = open_store(store)
    damage = verify_store(opened, sample=sample, seed=seed)
    for line in damage:
        typer.echo(line)
    if damage:
        raise typer.Exit(1)
    state = "complete" if opened.complete else "incomplete: run its build again to finish it"
    read = "all as written" if sample == 1 else f"those read ({sample:.0%}) as written"
    typer.echo(f"{len(opened)} rows in {len(opened.shards)} shards, {read}; {state}")


def repair(store: StoreArgument, model: ModelOption, data: DataOption) -> None:
    """Rebuild the damaged shards of a store from the model and the whole corpus."""
    from trackstar.storage.repair import repair_store

    network, tokenizer = load_model(model)
    rebuilt = repair_store(store, network, read_jsonl(data, "--data"), tokenizer=tokenizer)
    typer.echo(f"{len(rebuilt)} shards rebuilt")


def append(
    store: StoreArgument,
    model: ModelOption,
    data: DataOption,
    resume: Annotated[
        bool, typer.Option(help="Drop what an interrupted append of other documents wrote, with --no-resume.")
    ] = True,
) -> None:
    """Add documents to a store; R_train stays as it is."""
    from trackstar.storage.append import append_store

    network, tokenizer = load_model(model)
    examples = read_jsonl(data, "--data")
    typer.echo(f"{append_store(store, network, examples, tokenizer=tokenizer, resume=resume)}")


def delete(
    store: StoreArgument,
    index: Annotated[list[int] | None, typer.Option(help="Index of a row; may be given often.")] = None,
    id: Annotated[list[str] | None, typer.Option(help="Id of a document; may be given often.")] = None,
    ids: Annotated[Path | None, typer.Option(help="File of ids, one a line.")] = None,
) -> None:
    """Delete rows of a store; the others keep their indices."""
    from trackstar.storage.deletion import delete_rows
    from trackstar.storage.store import open_store

    names = [*(id or []), *([] if ids is None else ids.read_text(encoding="utf-8").splitlines())]
    if not index and not names:
        raise typer.BadParameter("give --index, --id or --ids")
    before = open_store(store)
    after = delete_rows(store, [*(index or []), *(before.indices_of(names) if names else [])])
    typer.echo(f"{len(before) - len(after)} rows deleted; {after}")


def merge(
    out: OutOption,
    stores: Annotated[
        list[Path], typer.Argument(metavar="STORE...", help="Folders of the stores, in order.")
    ],
) -> None:
    """Make one store of several that have spec, dtype, model and R_train in common."""
    from trackstar.storage.merge import merge_stores

    typer.echo(f"{merge_stores(out, stores)}")


def reencode(
    store: StoreArgument,
    out: OutOption,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the new store's rows.")],
    wide: WideOption = None,
) -> None:
    """Make a store of the same rows in another dtype, without the model."""
    from trackstar.storage.rewriting import reencode_store

    typer.echo(f"{reencode_store(store, out, dtype.value, wide=wide and wide.value)}")


def rewhiten(
    store: StoreArgument,
    out: OutOption,
    like: Annotated[
        Path | None, typer.Option(help="Store whose R_train to take; without it, that of all rows of STORE.")
    ] = None,
) -> None:
    """Make a store of the same rows whitened by another R_train, without the model."""
    from trackstar.storage.rewriting import rewhiten_store
    from trackstar.storage.store import open_store

    curvature = None if like is None else open_store(like).curvature
    typer.echo(f"{rewhiten_store(store, out, curvature=curvature)}")


COMMANDS = (verify, repair, append, delete, merge, reencode, rewhiten)
