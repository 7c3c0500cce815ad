"""The report's sections on what the methods find: provenance, the ladder, the sweeps."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import figures
from experiments.document import Document, Record, common, interval
from experiments.sweeps import SWEEPS

FORMS = {"plain": "plain", "alias": "by an alias", "stripped": "name stripped"}


def provenance(page: Document, record: Record, folder: Path) -> None:
    """What was trained on, and what that made likelier."""
    results = record["results"]
    facts = results["facts"]
    gain_of = {
        name: [
            fact["log-probability after"] - fact["log-probability before"]
            for fact in facts
            if fact["form"] == form
        ]
        for form, name in FORMS.items()
    }
    gains = [gain for group in gain_of.values() for gain in group]
    losses = ", ".join(f"{loss:.2f}" for loss in results["training loss by epoch"])
    page.text(
        f"SmolLM2-135M was fine-tuned on {results['passages']} passages; training loss by epoch: {losses}. Of "
        f"{len(facts)} facts the probability of {sum(gain > 0 for gain in gains)} rose, by a factor of "
        f"{math.exp(statistics.median(gains)):.1f} in the median; {sum(fact['asked'] for fact in facts)} of those "
        "that rose are asked."
    )
    rows = []
    for form, name in FORMS.items():
        group = [fact for fact in facts if fact["form"] == form]
        knew, knows, asked = (sum(fact[field] for fact in group) for field in ("knew", "knows", "asked"))
        rows.append([name, len(group), knew, knows, sum(gain > 0 for gain in gain_of[name]), asked])
    page.table(["form", "facts", "answered before", "answered after", "likelier after", "asked"], rows)
    figures.learning({name: group for name, group in gain_of.items() if group}, folder / "learning.png")
    page.figure(
        "learning.png",
        f"How much likelier fine-tuning made the answers of {len(facts)} facts, by the form of the question "
        f"(number of facts); seed {record['seed']}",
    )


def ladder(page: Document, record: Record, folder: Path) -> None:
    """Every method on the same questions and passages."""
    results = record["results"]
    quality = results["quality"]
    page.text(
        f"{results['questions']} questions, {results['passages']} passages. "
        "MRR and Recall@10 of the best ranked gold passage, with 95% bootstrap intervals over questions. "
        "Relation gold is the passage that states the fact; lexical gold mentions the subject as asked, and the object."
    )
    methods = list(dict.fromkeys(row["method"] for row in quality))
    groups = {
        "all": _figures(quality, "relation", "", ""),
        **{FORMS[form]: rows for form, rows in _values(quality, "relation", "form").items()},
        "lexical gold": _figures(quality, "lexical", "", ""),
    }
    groups = {name: rows for name, rows in groups.items() if rows}
    for measure, name in (("mrr", "MRR"), ("recall", "Recall@10")):
        counts = [f"{label} ({next(iter(rows.values()))['queries']})" for label, rows in groups.items()]
        lines = [
            [method, *(interval(rows[method][measure]) for rows in groups.values())] for method in methods
        ]
        page.table([name, *counts], lines)
    shown = {
        f"{FORMS[form]} ({next(iter(rows.values()))['queries']})": {
            method: rows[method]["mrr"] for method in methods
        }
        for form, rows in _values(quality, "relation", "form").items()
    }
    figures.points(shown, "MRR on relation gold", folder / "ladder.png")
    page.figure(
        "ladder.png",
        f"MRR of every method by the form of the question (number of questions); {common(record)}",
    )
    lines = [[method, interval(row, signed=True)] for method, row in results["MRR above TrackStar's"].items()]
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
    page.figure(
        "relations.png", f"MRR on relation gold by relation (number of questions); seed {record['seed']}"
    )
    for field, gold, title in (
        ("knows", "relation", "Does the fine-tuned model answer correctly?"),
        ("knew", "relation", "Did the model answer correctly before?"),
        ("passages with the answer", "relation", "In how many passages do the answer's words stand?"),
        ("gold passages", "lexical", "How many passages mention both (lexical gold)?"),
    ):
        page.heading(title, 3)
        split = _values(quality, gold, field)
        names = [f"{name} ({rows[methods[0]]['queries']})" for name, rows in split.items()]
        lines = [[method, *(interval(rows[method]["mrr"]) for rows in split.values())] for method in methods]
        page.table(["MRR", *names], lines)


def sweeps(page: Document, records: Mapping[str, Record], folder: Path) -> None:
    """One setting at a time; the records are by sweep, of those that have run."""
    results = {name: records[name]["results"] for name in SWEEPS if name in records}
    default = next(iter(results.values()))["default"]
    page.text(
        f"TrackStar's MRR on relation gold; the default's is {interval(default)}, the dashed line. Differences from it "
        "are taken question by question."
    )
    shown = {name.replace("_", " "): found["settings"] for name, found in results.items()}
    figures.sweeps(shown, default, folder / "sweeps.png")
    page.figure("sweeps.png", f"MRR on relation gold by setting; {common(next(iter(records.values())))}")
    for name, sweep in SWEEPS.items():
        page.heading(name.replace("_", " "), 3)
        if name not in results:
            page.text(f"This sweep has not run (python -m experiments.sweeps {name}).")
            continue
        page.text((sweep.__doc__ or "").strip())
        settings = results[name]["settings"]
        more = [key for key, value in settings[0].items() if isinstance(value, int | float)]
        lines = [
            [
                row["setting"],
                interval(row["mrr"]),
                interval(row["recall"]),
                interval(row["above the default"], signed=True),
                *(row[key] for key in more),
            ]
            for row in settings
        ]
        page.table(["setting", "MRR", "Recall@10", "MRR above the default's", *more], lines)


def _figures(quality: list[dict[str, Any]], gold: str, field: str, value: str) -> dict[str, dict[str, Any]]:
    """Each method's figures on one group of questions."""
    wanted = (gold, field, value)
    return {row["method"]: row for row in quality if (row["gold"], row["field"], row["value"]) == wanted}


def _values(quality: list[dict[str, Any]], gold: str, field: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Each method's figures by the values of a field."""
    values = sorted({row["value"] for row in quality if (row["gold"], row["field"]) == (gold, field)})
    return {value: _figures(quality, gold, field, value) for value in values}
