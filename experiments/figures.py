"""The report's figures: each takes a part's results and writes one PNG."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

Figure = Mapping[str, float]
"""{"value", "low", "high"}."""

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


def learning(gains: Mapping[str, Sequence[float]], file: Path) -> None:
    """How much likelier fine-tuning made each fact's answer, as differences of log p, by name of a group of facts."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    powers = [np.array(group) / np.log(10) for group in gains.values()]
    bins = np.linspace(min(map(min, powers)), max(map(max, powers)), 30)
    names = [f"{name} ({len(group)})" for name, group in gains.items()]
    axes.hist(powers, bins, label=names, color=COLOURS[: len(names)])
    axes.axvline(0, color="#444", linewidth=1)
    axes.set_xlabel("change of the answer's probability, in powers of ten")
    axes.set_ylabel("facts")
    axes.legend(frameon=False)
    _save(figure, file)


def points(
    series: Mapping[str, Mapping[str, Figure]],
    label: str,
    file: Path,
    *,
    marked: float = 0,
    limits: Mapping[str, float] | None = None,
) -> None:
    """Points with intervals, a line for each name from top to bottom, and a colour for each of the series.

    Args:
        series: {series: {name: its figure}}; a name may be missing from some.
        label: of the axis.
        file: to write.
        marked: where a line is drawn.
        limits: {series: a value that none of it can exceed}, drawn as a line of its colour.
    """
    names = list(dict.fromkeys(name for figures in series.values() for name in figures))
    apart = 0.7 / len(series)
    figure, axes = plt.subplots(figsize=(7.5, max(0.3, 0.16 * len(series)) * len(names) + 1.1))
    for number, (name, figures) in enumerate(series.items()):
        places = [names.index(line) + (number - (len(series) - 1) / 2) * apart for line in figures]
        values, errors = _with_errors(figures.values())
        axes.errorbar(
            values, places, xerr=errors, label=name, color=COLOURS[number], fmt="o", capsize=2, markersize=4
        )
        if limits is not None:
            axes.axvline(limits[name], color=COLOURS[number], linestyle="--", linewidth=1)
    axes.axvline(marked, color="#444", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    if len(series) > 1:
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(series))
    _save(figure, file)


def shares(rows: Mapping[str, Mapping[str, float]], label: str, file: Path) -> None:
    """Bars of one length, from top to bottom, divided into shares: {name: {kind: its share}}."""
    kinds = list(next(iter(rows.values())))
    figure, axes = plt.subplots(figsize=(7.5, 0.42 * len(rows) + 1.3))
    start = np.zeros(len(rows))
    for number, kind in enumerate(kinds):
        values = np.array([row[kind] for row in rows.values()])
        axes.barh(list(rows), values, left=start, label=kind, color=[*COLOURS, "#8f8f8f"][number], height=0.7)
        for place, (value, left) in enumerate(zip(values, start, strict=True)):
            if value >= 0.04:
                axes.text(
                    left + value / 2,
                    place,
                    f"{value:.0%}",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=8,
                )
        start += values
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(label)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)
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


def sweeps(parts: Mapping[str, Sequence[Mapping[str, Any]]], default: Figure, file: Path) -> None:
    """One panel for each sweep: MRR with its interval by setting, and a line at the default's."""
    columns = min(3, len(parts))
    lines = -(-len(parts) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(4 * columns, 3.1 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(parts) :]:
        axes.remove()
    for axes, (name, settings) in zip(panels.flat, parts.items(), strict=False):
        values, errors = _with_errors(setting["mrr"] for setting in settings)
        axes.errorbar(range(len(values)), values, errors, fmt="o", capsize=3, color=COLOURS[0])
        axes.axhline(default["value"], color=COLOURS[1], linestyle="--", linewidth=1)
        labels = [setting["setting"] for setting in settings]
        long = max(map(len, labels)) > 4
        axes.set_xticks(
            range(len(labels)), labels, rotation=30 if long else 0, ha="right" if long else "center"
        )
        axes.set_title(name)
        axes.set_ylim(0, 1)
    for axes in panels[:, 0]:
        axes.set_ylabel("MRR")
    _save(figure, file)


def _with_errors(figures: Iterable[Figure]) -> tuple[np.ndarray, np.ndarray]:
    """Values (n,), and how far below and above them their intervals end, (2, n)."""
    value, low, high = np.array([[figure[end] for end in ("value", "low", "high")] for figure in figures]).T
    return value, np.array([value - low, high - value])


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, bbox_inches="tight")
    plt.close(figure)
