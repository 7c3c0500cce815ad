"""Results as a table that a person can read."""

import re

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trackstar.result import Result

PASSAGE = 300
"""Characters of a passage that are shown."""

COMMON = frozenset(
    "a an and are as at be by can for from had has have he her his i in is it its of on or s she so that the "
    "their they this to was were which who will with you".split()
)


def print_result(result: Result, console: Console | None = None) -> None:
    """Print each query's table: rank, score, passage with the query's words marked.

    On a terminal the words are coloured; elsewhere they stand between asterisks.
    """
    console = Console(highlight=False) if console is None else console
    for i, query in enumerate(result.queries):
        remarks = ["proponents" if result.largest else "opponents"]
        if result.method != "trackstar":
            remarks.insert(0, result.method)
        if result.mixing is not None:
            remarks.append(f"λ = {result.mixing:.3f}")
        if result.rescored is not None:
            remarks.append(f"exact, {int(result.rescored[i]):,} rows rescored")
        if result.bounds is not None:
            remarks.append(f"scores ± {result.bounds[i].max():.4f} at most")
        heading = Text.assemble(
            ("\n" + query.prompt, "bold"),
            " → ",
            (query.target.strip(), "bold green"),
            f"   ({', '.join(remarks)})",
        )
        console.print(heading)
        table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
        table.add_column("rank", justify="right")
        table.add_column("score", justify="right")
        table.add_column("passage", overflow="fold")
        words = query_words(query.prompt + " " + query.target)
        scores, indices = result.scores[i].tolist(), result.indices[i].tolist()
        largest = max(map(abs, scores))
        # Cosines and sums of terms; what is far from 1 would be all zeros, or all digits.
        style = "+.4f" if largest == 0 or 1e-3 <= largest < 1e5 else "+.3e"
        for rank, (score, index) in enumerate(zip(scores, indices, strict=True), start=1):
            passage = mark(shorten(result.corpus.text(index)), words, plain=not console.is_terminal)
            table.add_row(str(rank), format(score, style), passage)
        console.print(table)


def query_words(text: str) -> frozenset[str]:
    """The words of a query that are worth marking, in lower case."""
    return frozenset(re.findall(r"\w+", text.lower())) - COMMON


def mark(passage: str, words: frozenset[str], *, plain: bool) -> Text:
    """The passage with ``words`` standing out: coloured, or between asterisks where ``plain``."""
    marked = Text()
    for piece in re.split(r"(\w+)", passage):
        if piece.lower() not in words:
            marked.append(piece)
        elif plain:
            marked.append(f"*{piece}*")
        else:
            marked.append(piece, style="bold yellow")
    return marked


def shorten(passage: str) -> str:
    """The passage on one line, cut at a word after ``PASSAGE`` characters."""
    line = " ".join(passage.split())
    return line if len(line) <= PASSAGE else line[:PASSAGE].rsplit(" ", 1)[0] + " …"
