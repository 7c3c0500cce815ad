"""Results as a table that a person can read."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trackstar.scoring.result import Result

PASSAGE = 300
"""Characters of a passage that are shown."""

BLOCKS = 5
"""Layer blocks whose terms are shown, of those that a result has."""

TOKENS = 8
"""Tokens whose terms are shown."""

COMMON = frozenset(
    "a an and are as at be by can for from had has have he her his i in is it its of on or s she so that the "
    "their they this to was were which who will with you".split()
)


def print_result(result: Result, console: Console | None = None, *, tokenizer: Any = None) -> None:
    """Print each query's table: rank, score, passage with the query's words marked.

    On a terminal the words are coloured; elsewhere they stand between asterisks. Where the result has them, the
    largest terms of the score follow: of layer blocks, and, given the tokenizer, of tokens.
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
            for line in _terms(result, i, rank - 1, tokenizer):
                passage.append("\n" + line, style="dim")
            table.add_row(str(rank), format(score, style), passage)
        console.print(table)


def _terms(result: Result, query: int, place: int, tokenizer: Any) -> list[str]:
    """What the score is mostly the sum of, a line each for blocks and tokens."""
    lines = []
    if result.by_block is not None:
        lines.append("blocks: " + largest_terms(result.by_block[query, place], result.blocks, BLOCKS))
    if result.by_token is not None and tokenizer is not None:
        ids = result.corpus.tokens(int(result.indices[query, place])).tolist()
        names = [repr(tokenizer.decode([token])) for token in ids]
        lines.append("tokens: " + largest_terms(result.by_token[query][place], names, TOKENS))
    return lines


def largest_terms(terms: torch.Tensor, names: Sequence[str], count: int) -> str:
    """The terms furthest from zero, with their names."""
    order = terms.abs().argsort(descending=True, stable=True)[:count].tolist()
    return ", ".join(f"{names[i]} {terms[i].item():+.4f}" for i in order)


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
