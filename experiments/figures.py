"""The report's figures: each takes a part's results and writes one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")
from matplotlib import pyplot as plt

mpl.rcParams |= {
    "figure.dpi": 120,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "font.size": 10,
}

COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#8d6a9f")


def learning(results: Mapping[str, Any], file: Path) -> None:
    """How much likelier fine-tuning made each fact's answer, by the form it is asked in."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    forms = sorted({fact["form"] for fact in results["facts"]}, reverse=True)
    gains = [
        [
            (fact["log-probability after"] - fact["log-probability before"]) / np.log(10)
            for fact in results["facts"]
            if fact["form"] == form
        ]
        for form in forms
    ]
    names = [f"{form} ({len(values)})" for form, values in zip(forms, gains, strict=True)]
    bins = np.linspace(min(map(min, gains)), max(map(max, gains)), 30)
    axes.hist(gains, bins, label=names, color=COLOURS[: len(forms)])
    axes.axvline(0, color="#444", linewidth=1)
    axes.set_xlabel("change of the answer's probability, in powers of ten")
    axes.set_ylabel("facts")
    axes.legend(frameon=False)
    _save(figure, file)


def bars(groups: Mapping[str, Mapping[str, Mapping[str, float]]], label: str, file: Path) -> None:
    """Bars with intervals: {group: {method: {value, low, high}}}, methods from top to bottom."""
    methods = list(next(iter(groups.values())))
    height = 0.8 / len(groups)
    figure, axes = plt.subplots(figsize=(7.5, 0.45 * len(methods) * max(1, 0.6 * len(groups)) + 1))
    for number, (group, figures) in enumerate(groups.items()):
        places = np.arange(len(methods)) + (number - (len(groups) - 1) / 2) * height
        values = np.array([figures[method]["value"] for method in methods])
        errors = [
            values - [figures[method]["low"] for method in methods],
            [figures[method]["high"] for method in methods] - values,
        ]
        axes.barh(
            places, values, height * 0.9, xerr=errors, label=group, color=COLOURS[number], ecolor="#444"
        )
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    if len(groups) > 1:
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(groups))
    _save(figure, file)


def heatmap(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], file: Path
) -> None:
    """Values in [0, 1] as a table of colours, with the numbers in them."""
    figure, axes = plt.subplots(figsize=(1.2 + 0.85 * len(columns), 1.2 + 0.38 * len(rows)))
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            axes.text(
                j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black"
            )
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    _save(figure, file)


def sweeps(parts: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """One panel for each sweep: MRR with its interval by setting."""
    columns = min(3, len(parts))
    lines = -(-len(parts) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(4 * columns, 3 * lines), sharey=True, squeeze=False
    )
    for axes in panels.flat[len(parts) :]:
        axes.remove()
    for axes, (name, settings) in zip(panels.flat, parts.items(), strict=False):
        values = np.array([setting["mrr"]["value"] for setting in settings])
        errors = [
            values - [setting["mrr"]["low"] for setting in settings],
            [setting["mrr"]["high"] for setting in settings] - values,
        ]
        axes.errorbar(range(len(values)), values, errors, marker="o", capsize=3, color=COLOURS[0])
        labels = [setting["setting"] for setting in settings]
        long = max(map(len, labels)) > 6
        axes.set_xticks(
            range(len(labels)), labels, rotation=30 if long else 0, ha="right" if long else "center"
        )
        axes.set_title(name)
        axes.set_ylim(0, 1)
    for axes in panels[:, 0]:
        axes.set_ylabel("MRR")
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, bbox_inches="tight")
    plt.close(figure)
