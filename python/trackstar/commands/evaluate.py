"""The command that measures how well methods find the right examples."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from trackstar.commands.options import MethodName, load_model, read_jsonl


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
    method: Annotated[
        list[MethodName] | None,
        typer.Option(help="What to score by, see docs/methods.md; may be given often. Default: trackstar."),
    ] = None,
    mixing: Annotated[
        list[str] | None,
        typer.Option(help='λ of trackstar, a number or "auto"; may be given often.'),
    ] = None,
    factors: Annotated[Path | None, typer.Option(help="Folder of EK-FAC's factors, for ekfac.")] = None,
    encoder: Annotated[
        Path | None, typer.Option(help="Folder of a sentence-transformers model, for dense.")
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

    from trackstar.evaluation.metrics import Quality, evaluate, ids_in

    asked = read_jsonl(queries, "--queries")
    ranked = {}
    for given in results or []:
        name, equals, path = given.partition("=")
        if not equals:
            raise typer.BadParameter(f"--results must be NAME=FILE, got {given!r}")
        ranked[name] = ids_in(Path(path).read_text(encoding="utf-8").splitlines())
    if store is not None and model is not None:
        methods = [one.value for one in method or [MethodName.trackstar]]
        ranked |= _answers(store, model, asked, methods, mixing or ["auto"], factors, encoder)
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
    store: Path,
    model: Path,
    queries: list[dict[str, object]],
    methods: list[str],
    mixing: list[str],
    factors: Path | None,
    encoder: Path | None,
) -> dict[str, list[list[str]]]:
    """What the store answers by each method, and each λ of TrackStar: ids, best first, as many as are looked at."""
    from trackstar.evaluation.metrics import DEPTH, ids_of
    from trackstar.scoring.attribution import attribute
    from trackstar.scoring.companion import companion_store
    from trackstar.storage.store import open_store

    opened = open_store(store)
    network, tokenizer = load_model(model)
    found = {}
    for method in methods:
        holding = companion_store(opened, network, method, tokenizer=tokenizer)
        for share in mixing if method == "trackstar" else ["auto"]:
            try:
                value = share if share == "auto" else float(share)
            except ValueError:
                raise typer.BadParameter(f'--mixing must be "auto" or a number, got {share!r}') from None
            result = attribute(
                holding,
                network,
                queries,
                tokenizer=tokenizer,
                method=method,
                k=min(len(opened), DEPTH),
                mixing=value,
                factors=factors if method == "ekfac" else None,
                encoder=encoder if method == "dense" else None,
            )
            shown = "" if result.mixing is None else f", λ = {result.mixing:.3f}"
            found[f"{result.method}{shown}"] = ids_of(result)
    return found
