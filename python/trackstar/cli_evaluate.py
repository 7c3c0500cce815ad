"""The command that measures how well methods find the right examples."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from trackstar.cli_options import load_model, read_jsonl


def evaluate(
    queries: Annotated[
        Path, typer.Option(help='JSONL of {"prompt": …, "target": …, "gold": [ids of the right examples]}.')
    ],
    store: Annotated[Path | None, typer.Argument(metavar="[STORE]", help="Folder of a store to ask.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the model that the store was built with.")
    ] = None,
    results: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Results that were written before, one line a query; may be given often.",
        ),
    ] = None,
    mixing: Annotated[
        list[str] | None,
        typer.Option(help='λ, a number or "auto", to ask the store with; may be given often.'),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="A field of the queries to group by; may be given often."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measure MRR and Recall@10 of a store's answers, or of results, against known right examples."""
    if (store is None) == (not results) or (store is None) != (model is None):
        raise typer.BadParameter("give STORE and --model, or --results")
    from rich.console import Console
    from rich.table import Table

    from trackstar.evaluation import Quality, evaluate, ids_in

    asked = read_jsonl(queries, "--queries")
    ranked = {}
    for given in results or []:
        name, equals, path = given.partition("=")
        if not equals:
            raise typer.BadParameter(f"--results must be NAME=FILE, got {given!r}")
        ranked[name] = ids_in(Path(path).read_text(encoding="utf-8").splitlines())
    if store is not None and model is not None:
        ranked |= _answers(store, model, asked, mixing or ["auto"])
    found: list[Quality] = evaluate(ranked, asked, by=by or ())
    table = Table("method", "queries", "n", "MRR", "Recall@10")
    for quality in found:
        group = f"{quality.field} = {quality.value}" if quality.field else "all"
        table.add_row(quality.method, group, str(quality.queries), str(quality.mrr), str(quality.recall))
    Console(highlight=False).print(table)
    if out is not None:
        out.write_text(json.dumps([dataclasses.asdict(q) for q in found], indent=1) + "\n", encoding="utf-8")
        typer.echo(f"written: {out}")


def _answers(
    store: Path, model: Path, queries: list[dict[str, object]], mixing: list[str]
) -> dict[str, list[list[str]]]:
    """What the store answers with each λ: ids, best first, as many as are looked at."""
    from trackstar.attribution import attribute
    from trackstar.evaluation import DEPTH, ids_of
    from trackstar.store import open_store

    opened = open_store(store)
    network, tokenizer = load_model(model)
    found = {}
    for share in mixing:
        try:
            value = share if share == "auto" else float(share)
        except ValueError:
            raise typer.BadParameter(f'--mixing must be "auto" or a number, got {share!r}') from None
        result = attribute(
            opened, network, queries, tokenizer=tokenizer, k=min(len(opened), DEPTH), mixing=value
        )
        found[f"{result.method}, λ = {result.mixing:.3f}"] = ids_of(result)
    return found
