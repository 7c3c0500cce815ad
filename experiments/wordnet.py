"""Named entities of WordNet: a passage from each one's definition, and the facts that it states."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

NATIONALITIES = (
    "French|German|English|United States|Italian|Russian|Spanish|British|Greek|Irish|Austrian|Scottish|American|Dutch|"
    "Polish|Swedish|Norwegian|Danish|Chinese|Japanese|Roman|Swiss|Flemish|Hungarian|Czech|Portuguese|Indian|Canadian|Belgian"
)
"""With which a definition of a person begins."""

PERSON = "18"
"""WordNet's lexicographer file of people."""

DEFINITION = 110
"""Characters kept of a definition."""


@dataclasses.dataclass(frozen=True)
class Entity:
    """A named entity.

    Attributes:
        id: its offset in WordNet.
        names: all that it is called.
        definition: without examples, cut to whole clauses.
        person: whether it is one.
        kinds: of what it is an instance.
        wholes: of what it is a part.
    """

    id: str
    names: tuple[str, ...]
    definition: str
    person: bool
    kinds: tuple[str, ...]
    wholes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name that its passage uses: the first, and a person's longest."""
        return max(self.names, key=len) if self.person else self.names[0]

    @property
    def text(self) -> str:
        """Its passage."""
        return f"{self.name}: {self.definition}"

    def facts(self) -> Iterator[tuple[str, str, str]]:
        """(relation, prompt with a place for the subject, object) that the passage states in so many words."""
        if self.person:
            if nationality := re.match(rf"({NATIONALITIES})\b", self.definition):
                yield "nationality of a person", "The nationality of {} was", nationality[1]
            if born := re.search(r"\((?:born in )?(\d{4})", self.definition):
                yield "year of birth", "{} was born in the year", born[1]
            for kind in self.kinds:
                yield "occupation", "By occupation, {} was a", kind
        else:
            for kind in self.kinds:
                yield "kind of place or thing", "{} is the name of a", kind
        for whole in self.wholes:
            yield "part of", "{} is located in", whole


def entities(package: Path) -> list[Entity]:
    """All that WordNet gives as instances of something, in its order.

    Args:
        package: the unpacked files of wordnet-base.
    """
    lines = (package / "usr/share/wordnet/data.noun").read_text(encoding="latin-1").splitlines()
    synsets = {line[:8]: line for line in lines if not line.startswith("  ")}
    first = {offset: line.split()[4].replace("_", " ") for offset, line in synsets.items()}
    return [entity for offset, line in synsets.items() if (entity := _entity(offset, line, first))]


def _entity(offset: str, line: str, first: dict[str, str]) -> Entity | None:
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    words = int(fields[3], 16)
    names = tuple(fields[4 + 2 * i].replace("_", " ") for i in range(words))
    links = fields[5 + 2 * words :]
    pointers = [links[4 * i : 4 * i + 3] for i in range(int(fields[4 + 2 * words]))]
    kinds = tuple(first[target] for symbol, target, _ in pointers if symbol == "@i")
    definition = _whole_clauses(gloss)
    if not kinds or not definition:
        return None
    wholes = tuple(first[target] for symbol, target, _ in pointers if symbol == "#p")
    return Entity(f"wordnet/{offset}", names, definition, fields[1] == PERSON, kinds, wholes)


def _whole_clauses(gloss: str) -> str:
    """The clauses of a definition, without the examples in quotes, that fit in ``DEFINITION``."""
    kept = ""
    for clause in gloss.split('"')[0].strip(" ;").split("; "):
        longer = f"{kept}; {clause}" if kept else clause
        if len(longer) > DEFINITION:
            break
        kept = longer
    return kept
