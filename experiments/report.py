"""Turn every part's JSON into one page, report/report.md and .html, with figures. Parts that have not run are named."""

import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import figures
from experiments.document import Document
from experiments.study import Study, study
from experiments.sweeps import SWEEPS

FORMS = {"plain": "plain", "alias": "by an alias", "stripped": "name stripped"}


def main(argv: list[str] | None = None) -> int:
    """Write the page."""
    here = study(__doc__, argv)
    records = {}
    for file in sorted(here.path("results", "any").parent.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        records[record["part"]] = record
    folder = here.path("report", "any").parent
    folder.mkdir(exist_ok=True)
    page = Document(f"Evidence: the study at size {here.name}, seed {here.seed}")
    _machine(page, records)
    for part, section in SECTIONS.items():
        if part in records:
            section(page, records.pop(part), folder)
        else:
            page.text(f"The part {part} has not run (python -m experiments.{part} --size {here.name}).")
    _sweeps(page, here, records, folder)
    for part, record in records.items():
        page.heading(part)
        _plainly(page, record["results"])
    page.write(folder, "report")
    print(folder / "report.html")
    return 0


def _machine(page: Document, records: Mapping[str, Any]) -> None:
    made = {
        json.dumps([record["machine"], record["versions"]], sort_keys=True) for record in records.values()
    }
    for text in sorted(made):
        machine, versions = json.loads(text)
        said = ", ".join(f"{name} {value}" for name, value in (machine | versions).items())
        page.text(f"Made with: {said}.")


def _provenance(page: Document, record: Mapping[str, Any], folder: Path) -> None:
    results = record["results"]
    facts = results["facts"]
    gains = [fact["log-probability after"] - fact["log-probability before"] for fact in facts]
    rose = sum(gain > 0 for gain in gains)
    factor = math.exp(statistics.median(gains))
    losses = ", ".join(f"{loss:.2f}" for loss in results["training loss by epoch"])
    page.heading("Provenance: what was trained on, and what was learned")
    page.text(
        f"SmolLM2-135M was fine-tuned on {results['passages']} passages; training loss by epoch: {losses}. Of "
        f"{len(facts)} facts the probability of {rose} rose, by a factor of {factor:.1f} in "
        f"the median; {sum(fact['asked'] for fact in facts)} of them are asked."
    )
    rows = []
    for form, name in FORMS.items():
        group = [fact for fact in facts if fact["form"] == form]
        asked = [fact for fact in group if fact["asked"]]
        rows.append(
            [
                name,
                len(group),
                sum(fact["knew"] for fact in group),
                sum(fact["knows"] for fact in group),
                sum(fact["log-probability after"] > fact["log-probability before"] for fact in group),
                len(asked),
            ]
        )
    page.table(["form", "facts", "answered before", "answered after", "likelier after", "asked"], rows)
    figures.learning(results, folder / "learning.png")
    page.figure("learning.png", "How much likelier fine-tuning made the answers, by the form of the question")


def _ladder(page: Document, record: Mapping[str, Any], folder: Path) -> None:
    results = record["results"]
    quality = results["quality"]
    page.heading("The ladder: every method on the same questions and passages")
    page.text(
        f"{results['questions']} questions, {results['passages']} passages. "
        "MRR and Recall@10 of the best ranked gold passage, with 95% bootstrap intervals over questions. "
        "Relation gold is the passage that states the fact; lexical gold mentions the subject as asked, and the object."
    )
    methods = list(dict.fromkeys(row["method"] for row in quality))
    groups = {
        "all, relation gold": _figures(quality, "relation", "", ""),
        "plain, relation gold": _figures(quality, "relation", "form", "plain"),
        "alias, relation gold": _figures(quality, "relation", "form", "alias"),
        "stripped, relation gold": _figures(quality, "relation", "form", "stripped"),
        "lexical gold": _figures(quality, "lexical", "", ""),
    }
    groups = {name: rows for name, rows in groups.items() if rows}
    for measure, name in (("mrr", "MRR"), ("recall", "Recall@10")):
        counts = [f"{label} ({next(iter(rows.values()))['queries']})" for label, rows in groups.items()]
        lines = [
            [method, *(_interval(rows[method][measure]) for rows in groups.values())] for method in methods
        ]
        page.table([name, *counts], lines)
    shown = {
        name: {method: rows[method]["mrr"] for method in methods}
        for name, rows in groups.items()
        if name.startswith(("plain", "alias", "stripped"))
    }
    figures.bars(shown, "MRR on relation gold", folder / "ladder.png")
    page.figure("ladder.png", "MRR of every method by the form of the question, with 95% intervals")
    lines = [
        [method, f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"]
        for method, row in results["MRR above TrackStar's"].items()
    ]
    page.text("TrackStar against each, question by question (relation gold, paired bootstrap):")
    page.table(["method", "MRR above TrackStar's"], lines)
    page.text(
        "Misses that are no accident: of the questions whose first passage is not the one that states the fact, those "
        "where it has the answer's words all the same."
    )
    elsewhere = results["top passage without gold, but with the answer"]
    page.table(
        ["method", "with the answer", "of"], [[method, *counts] for method, counts in elsewhere.items()]
    )
    relations = _values(quality, "relation", "relation")
    table = [[rows[m]["mrr"]["value"] for m in methods] for rows in relations.values()]
    labels = [f"{name} ({rows[methods[0]]['queries']})" for name, rows in relations.items()]
    figures.heatmap(table, labels, methods, folder / "relations.png")
    page.figure("relations.png", "MRR by relation (relation gold; number of questions)")
    for field, gold, title in (
        ("knows", "relation", "Does the fine-tuned model answer correctly?"),
        ("knew", "relation", "Did the model answer correctly before?"),
        ("passages with the answer", "relation", "In how many passages do the answer's words stand?"),
        ("gold passages", "lexical", "How many passages mention both (lexical gold)?"),
    ):
        page.heading(title, 3)
        split = _values(quality, gold, field)
        names = [f"{name} ({rows[methods[0]]['queries']})" for name, rows in split.items()]
        lines = [[method, *(_interval(rows[method]["mrr"]) for rows in split.values())] for method in methods]
        page.table(["MRR", *names], lines)


def _sweeps(page: Document, here: Study, records: dict[str, Any], folder: Path) -> None:
    page.heading("Sweeps: one setting at a time")
    found = {name: records.pop(f"sweep-{name}") for name in SWEEPS if f"sweep-{name}" in records}
    if found:
        figures.sweeps({name: record["results"] for name, record in found.items()}, folder / "sweeps.png")
        page.figure("sweeps.png", "TrackStar's MRR on relation gold by setting, with 95% intervals")
    for name in SWEEPS:
        page.heading(name.replace("_", " "), 3)
        if name not in found:
            page.text(f"This sweep has not run (python -m experiments.sweeps --size {here.name} {name}).")
            continue
        results = found[name]["results"]
        page.text(found[name]["settings"]["sweep"])
        more = [key for key in results[0] if isinstance(results[0][key], int | float)]
        lines = [
            [
                row["setting"],
                _interval(row["mrr"]),
                _interval(row["recall"]),
                f"{row['above the default']['value']:+.3f} "
                f"[{row['above the default']['low']:+.3f}, {row['above the default']['high']:+.3f}]",
                *(row[key] for key in more),
            ]
            for row in results
        ]
        page.table(["setting", "MRR", "Recall@10", "MRR above the default's", *more], lines)


def _plainly(page: Document, results: Any) -> None:
    """A part that this page knows nothing of: lists of records as tables, all else as it is."""
    if isinstance(results, list) and results and all(isinstance(row, dict) for row in results):
        columns = list(dict.fromkeys(key for row in results for key in row))
        page.table(columns, [[_brief(row.get(key, "")) for key in columns] for row in results])
    elif isinstance(results, dict):
        for name, value in results.items():
            if isinstance(value, list | dict):
                page.heading(name, 3)
                _plainly(page, value)
            else:
                page.text(f"{name}: {_brief(value)}")
    else:
        page.text(_brief(results))


def _brief(value: Any) -> str:
    if isinstance(value, dict) and {"value", "low", "high"} <= value.keys():
        return _interval(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figures(quality: list[dict[str, Any]], gold: str, field: str, value: str) -> dict[str, dict[str, Any]]:
    """Each method's figures on one group of questions."""
    wanted = (gold, field, value)
    return {row["method"]: row for row in quality if (row["gold"], row["field"], row["value"]) == wanted}


def _values(quality: list[dict[str, Any]], gold: str, field: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Each method's figures by the values of a field."""
    values = sorted({row["value"] for row in quality if (row["gold"], row["field"]) == (gold, field)})
    return {value: _figures(quality, gold, field, value) for value in values}


def _interval(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


SECTIONS = {"provenance": _provenance, "ladder": _ladder}


if __name__ == "__main__":
    sys.exit(main())
