"""The report's sections on what passages do: tail-patch, kinds, the order of words, retraining."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import figures
from experiments.document import Document, Record, common, interval
from experiments.opponents import PLACES

PERCENT = 100

LOWEST = 8
"""Gold passages of the lowest scores that are shown."""


def tail_patch(page: Document, record: Record, folder: Path) -> None:
    """One optimizer step on each proponent."""
    results, settings = record["results"], record["settings"]
    gains = results["gains"]
    idle = gains[-1]["change"]
    page.text(
        "From the fine-tuned model, one step of its own AdamW on one passage, and how many percentage points likelier "
        f"that makes the answer, in the mean over the k best passages and over {settings['questions']} questions. The "
        "saved momentum goes on whatever the passage is: a step on no passage changes the probability by "
        f"{interval(idle, signed=True, scale=PERCENT)}, which is taken off. Gold are the passages that state the fact."
    )
    methods = list(dict.fromkeys(row["method"] for row in gains[:-1]))
    by_k = {
        f"k = {k}": {row["method"]: row for row in gains if row["k"] == k}
        for k in sorted({row["k"] for row in gains[:-1]})
    }
    for title, field in (
        ("points above no passage", "above no passage"),
        ("TrackStar's above it", "TrackStar above it"),
    ):
        lines = [
            [
                method,
                *(
                    interval(rows[method][field], signed=True, scale=PERCENT) if method in rows else ""
                    for rows in by_k.values()
                ),
            ]
            for method in methods
        ]
        page.table([title, *by_k], lines)
    shown = {
        k: {
            method: {end: PERCENT * value for end, value in row["above no passage"].items()}
            for method, row in rows.items()
        }
        for k, rows in by_k.items()
    }
    figures.points(shown, "percentage points above a step on no passage", folder / "tail-patch.png")
    page.figure(
        "tail-patch.png",
        "Change of the answer's probability by a step on a passage, mean over the first k; "
        f"{settings['questions']} questions, {common(record)}",
    )
    page.text("Do scores and changes agree? Rank correlation over all passages tried for a question:")
    page.table(
        ["method", "rank correlation"],
        [[row["method"], interval(row["rank correlation"], signed=True)] for row in results["agreement"]],
    )
    gold = results["gold"]
    below, others = (
        [row["change"] > row["change by no passage"] for row in gold if (row["score"] < 0) == negative]
        for negative in (True, False)
    )
    page.text(
        "Does a step on a passage that states the fact make the answer likelier than one on no passage? Of the "
        f"passages that TrackStar scores below 0, in {sum(below)} of {len(below)} cases; of the others, in "
        f"{sum(others)} of {len(others)}. Those that it scores lowest:"
    )
    lines = [
        [
            row["prompt"] + row["target"],
            row["passage"],
            row["score"],
            row["rank"],
            row["probability"],
            f"{PERCENT * (row['change'] - row['change by no passage']):+.2f}",
        ]
        for row in gold[:LOWEST]
    ]
    page.table(["question", "passage", "score", "rank", "probability", "points above no passage"], lines)


def opponents(page: Document, record: Record, folder: Path) -> None:
    """At which tokens the scores of passages that state a fact are made."""
    results = record["results"]
    means = results["mean terms of gold"]
    page.text(
        "TrackStar's score of a passage is a sum over its tokens. Here they are added up by what the model predicts at "
        "each: the passage's heading, the answer, or anything else. Means over passages that state the fact, by the "
        "sign of their score:"
    )
    page.table(list(means[0]), [list(row.values()) for row in means])
    page.text("Those of the lowest scores:")
    columns = ("prompt", "target", "passage", "score", "rank", *PLACES)
    page.table(columns, [[row[column] for column in columns] for row in results["lowest"][:LOWEST]])


def kinds(page: Document, record: Record, folder: Path) -> None:
    """What kinds of passages are found (Figure 3)."""
    results, top = record["results"], record["settings"]["top"]
    page.text(
        f"Each method's {top} best passages of every question, told apart by rule: the first kind that fits counts."
    )
    names = [name for name in results[0] if name != "method"]
    page.table(
        ["method", *names], [[row["method"], *(f"{row[name]:.1%}" for name in names)] for row in results]
    )
    shown = {row["method"]: {name: row[name] for name in names} for row in results}
    figures.shares(shown, f"share of the {top} best passages", folder / "kinds.png")
    page.figure(
        "kinds.png",
        f"Kinds of proponents among the {top} best of each of {record['settings']['questions']} questions; "
        f"seed {record['seed']}",
    )


def order(page: Document, record: Record, folder: Path) -> None:
    """Does influence fall when the parts of a key phrase change places?"""
    results = record["results"]
    page.text(
        f"{results['questions']} facts, each as a sentence of question and answer and as the passage trained on: in "
        "order, flipped, and without the answer. Influence is given relative to that of the text in order, as a ratio "
        "of means."
    )
    rows = results["ratios"]
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    of = {(row["measure"], row["text"], row["form"]): row for row in rows}
    places = list(dict.fromkeys((row["text"], row["form"]) for row in rows))
    page.table(
        ["text", "form", *measures],
        [[text, form, *(interval(of[m, text, form]["ratio"]) for m in measures)] for text, form in places],
    )
    forms = list(dict.fromkeys(form for _, form in places))[1:]
    texts = list(dict.fromkeys(text for text, _ in places))
    shown = {
        form: {
            f"{measure}, {text}": of[measure, text, form]["ratio"] for measure in measures for text in texts
        }
        for form in forms
    }
    figures.points(shown, "relative to the text in order", folder / "order.png", marked=1)
    page.figure(
        "order.png",
        f"Influence of a text on its fact, relative to the same text in order (1); {results['questions']} facts, "
        f"{common(record)}",
    )
    page.text("Some of them:")
    examples = results["examples"]
    columns = list(examples[0])
    page.table(columns, [list(row.values()) for row in examples])


def lds(page: Document, record: Record, folder: Path) -> None:
    """Linear datamodeling scores."""
    results, settings = record["results"], record["settings"]
    setup, seeds, subsets = settings["setup"], settings["seeds"], settings["subsets"]
    page.text(
        f"A small model (Llama, width 64, two layers) is trained from scratch on {setup['passages']} passages of the "
        f"Factbook, and again on {subsets} random halves of them with each of {seeds} seeds: {subsets * seeds} "
        "trainings. A method's score is the rank correlation, over the halves, of its summed scores with the answer's "
        "real log-probability. The ceiling is what a perfect prediction would reach, since seeds disagree."
    )
    shown = _by_group(page, results, "LDS", ("above TrackStar's",))
    limits = {group: rows.pop("ceiling")["value"] for group, rows in shown.items()}
    figures.points(shown, "LDS", folder / "lds.png", limits=limits)
    page.figure(
        "lds.png",
        "Linear datamodeling score by kind of question (number of questions), and its ceiling (dashed); "
        f"{subsets} halves, {seeds} seeds of training; {common(record)}",
    )


def removal(page: Document, record: Record, folder: Path) -> None:
    """Training again without the best passages."""
    results, settings = record["results"], record["settings"]
    page.text(
        f"The small model is trained again without the {settings['k']} best passages of a question, by each method. "
        "The more the answer's log-probability falls, the better they were chosen. Seeds of training: "
        f"{settings['seeds']}."
    )
    shown = _by_group(page, results, "fall of log p", ("above random's", "above BM25's"))
    figures.points(shown, "fall of the answer's log-probability", folder / "removal.png")
    page.figure(
        "removal.png",
        f"What an answer loses without its {settings['k']} best passages, by kind of question (number of questions); "
        f"{common(record)}",
    )


def _by_group(
    page: Document, results: Sequence[dict[str, Any]], measure: str, differences: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """A table of a measure by group of questions, and of differences over all; the measure by group but for all."""
    groups = {
        f"{row['queries']} ({row['n']})": {
            other["method"]: other for other in results if other["queries"] == row["queries"]
        }
        for row in results
    }
    every, *parts = groups
    lines = [
        [
            method,
            *(interval(rows[method][measure]) for rows in groups.values()),
            *(interval(row[field], signed=True) for field in differences),
        ]
        for method, row in groups[every].items()
    ]
    page.table([measure, *groups, *differences], lines)
    return {part: {method: row[measure] for method, row in groups[part].items()} for part in parts}
