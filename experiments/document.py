"""A page of headings, paragraphs, tables and figures, written as Markdown and as HTML."""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
"""What a part of the study wrote (``Study.write``)."""

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: 0.9rem }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888 }
img { max-width: 100% }
figure { margin: 1.5rem 0 }
figcaption { color: #666; font-size: 0.9rem }"""


@dataclasses.dataclass
class Document:
    """What was added to it, in order; text is plain, and means nothing in either language.

    Attributes:
        title: of the page.
        blocks: each as Markdown and as HTML.
    """

    title: str
    blocks: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def heading(self, text: str, level: int = 2) -> None:
        """Add a heading."""
        self.blocks.append((f"{'#' * level} {text}", f"<h{level}>{html.escape(text)}</h{level}>"))

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.blocks.append((text, f"<p>{html.escape(text)}</p>"))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table."""
        lines = [[_cell(value) for value in row] for row in (columns, *rows)]
        marked = ["| " + " | ".join(value.replace("|", "\\|") for value in line) + " |" for line in lines]
        marked.insert(1, "|" + "---|" * len(columns))
        head, *body = ([html.escape(value) for value in line] for line in lines)
        tagged = "".join(f"<th>{value}</th>" for value in head)
        rest = "\n".join("<tr>" + "".join(f"<td>{value}</td>" for value in line) + "</tr>" for line in body)
        self.blocks.append(("\n".join(marked), f"<table>\n<tr>{tagged}</tr>\n{rest}\n</table>"))

    def figure(self, file: str, caption: str) -> None:
        """Add a picture that lies beside the page."""
        shown = html.escape(caption)
        picture = f'<img src="{file}" alt="{shown}">'
        self.blocks.append(
            (f"![{caption}]({file})", f"<figure>{picture}<figcaption>{shown}</figcaption></figure>")
        )

    def write(self, folder: Path, name: str) -> None:
        """Write ``<name>.md`` and ``<name>.html``."""
        marked = "\n\n".join([f"# {self.title}", *(block[0] for block in self.blocks)])
        (folder / f"{name}.md").write_text(marked + "\n", encoding="utf-8")
        title = html.escape(self.title)
        body = "\n".join(block[1] for block in self.blocks)
        page = (
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n<style>{STYLE}</style>\n'
            f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
        )
        (folder / f"{name}.html").write_text(page, encoding="utf-8")


def interval(figure: Mapping[str, float], *, signed: bool = False, scale: float = 1) -> str:
    """A figure {"value", "low", "high"}, times ``scale``, in words: "0.123 [0.045, 0.201]", or signed."""
    value, low, high = (
        f"{scale * figure[end]:{'+' if signed else ''}.3f}" for end in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]"


def common(record: Record) -> str:
    """What the captions of a part's figures have in common."""
    return f"seed {record['seed']}, 95% bootstrap intervals over questions"


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
