"""A bar that moves on a terminal, and a line now and then where there is none."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console

LINE_EVERY = 10.0
"""Seconds between lines where the output is no terminal."""


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
        from trackstar.progress_bar import bar  # which takes as long to import as a small scan

        with bar(screen, label, total, done, unit, passing) as advance_bar:
            yield advance_bar
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
