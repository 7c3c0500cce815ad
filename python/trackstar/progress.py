"""A bar that moves on a terminal, and a line now and then where there is none."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_EVERY = 10.0
"""Seconds between lines where the output is no terminal."""


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} {self._unit}/s" if task.speed else "")


def console() -> Console:
    """Where progress and plans are shown: standard error, so that results can be piped."""
    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def track(
    label: str, total: int, done: int = 0, *, unit: str = "examples", passing: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show how far ``label`` has come; the block calls what it gets with the number of ``unit`` just done.

    Args:
        label: what is being done.
        total: units in all.
        done: those that were done before.
        unit: what is counted.
        passing: show nothing that outlasts it: for what often takes no time.
    """
    screen = console()
    if screen.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=screen, transient=passing) as bar:
            task = bar.add_task(label, total=total, completed=done)
            yield lambda count: bar.advance(task, count)
        return
    began = spoke = time.monotonic()
    fresh = 0

    def advance(count: int) -> None:
        nonlocal fresh, spoke
        fresh += count
        now = time.monotonic()
        if now - spoke >= LINE_EVERY or (done + fresh == total and not passing):
            spoke = now
            rate = fresh / max(now - began, 1e-9)
            left = (total - done - fresh) / max(rate, 1e-9)
            screen.print(f"{label}: {done + fresh}/{total} {unit}, {rate:.1f}/s, {left:.0f} s left")

    yield advance
