"""Facts, and a corpus of passages that state them, from WordNet and the CIA World Factbook. DATA: package registries.

A fact is asked in one of three forms:

- plain: by the name that its passage uses;
- alias: by a name that shares no word with its passage (WordNet);
- stripped: its passage is a Factbook field without the country's name, whose answer no other fact shares.

Two passages may count as the right ones. Lexical gold mentions the subject, by the name that is asked by, and the
object: the words alone give it away. Relation gold is the passage that states this very relation of the subject,
whatever words it uses. The corpus also holds, for some facts, other passages that mention both; passages on the same
subjects; and passages drawn at random.
"""

import dataclasses
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.assets import FACTBOOK, WORDNET, unpacked
from examples.corpus import RELATIONS, factbook_passages
from experiments.study import Study, write_whole
from experiments.wordnet import Entity, entities

Passage = dict[str, str]
"""{"id": …, "text": …}, as trackstar reads it."""

FORMS = ("plain", "alias", "stripped")

WIDTH = range(25, 100)
"""Characters of a passage."""

MENTIONS = 2
"""Passages, beyond the one that states a fact, that mention both its subject and its object, at most."""

NAMED = {
    "Capital": "capital",
    "Exchange rates": "currency",
    "National anthem(s)": "anthem",
    "Nationality": "adjective",
}
"""Factbook fields that state facts, and what the relation is called here."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """Something a passage states, and how the model is asked for it.

    Attributes:
        id: the id of the passage that states it, and the relation.
        relation: in words.
        form: one of ``FORMS``.
        subject: the name it is asked by.
        prompt: up to the answer.
        target: the answer, with the space before it.
        relation_gold: ids of the passages that state it.
        lexical_gold: ids of the passages that mention the subject and the object.
    """

    id: str
    relation: str
    form: str
    subject: str
    prompt: str
    target: str
    relation_gold: tuple[str, ...]
    lexical_gold: tuple[str, ...] = ()

    @property
    def object(self) -> str:
        """The answer, bare."""
        return self.target.strip()


def load(study: Study) -> tuple[list[Passage], list[Fact]]:
    """The study's passages and facts; put together, or read from a folder of the user's, at the first call."""
    path = study.path("corpus.json")
    if not path.is_file():
        passages, facts = assemble(study) if study.corpus is None else read(study.corpus)
        kept = {"passages": passages, "facts": [dataclasses.asdict(fact) for fact in facts]}
        write_whole(path, json.dumps(kept, indent=0, ensure_ascii=False))
    kept = json.loads(path.read_text(encoding="utf-8"))
    facts = [
        Fact(**fact | {name: tuple(fact[name]) for name in ("relation_gold", "lexical_gold")})
        for fact in kept["facts"]
    ]
    return kept["passages"], facts


def read(folder: Path) -> tuple[list[Passage], list[Fact]]:
    """Passages and facts of one's own.

    Args:
        folder: of passages.jsonl, {"id": …, "text": …}, and facts.jsonl, {"subject": …, "prompt": …, "target": …,
            "gold": [ids of the passages that state it]}, each with an optional "id", "relation" and "form".

    Raises:
        OSError: a file cannot be read.
        ValueError: a line lacks a field, or names a form or a passage that there is not, or an id stands twice.
    """
    passages = [{name: line[name] for name in ("id", "text")} for line in _lines(folder / "passages.jsonl")]
    texts = {passage["id"]: passage["text"] for passage in passages}
    facts = []
    for number, line in enumerate(_lines(folder / "facts.jsonl"), start=1):
        fact = Fact(
            line.get("id", f"fact-{number}"),
            line.get("relation", "fact"),
            line.get("form", FORMS[0]),
            *(line[name] for name in ("subject", "prompt", "target")),
            tuple(line["gold"]),
        )
        if fact.form not in FORMS:
            raise ValueError(
                f"facts.jsonl: form must be one of {', '.join(FORMS)}; {fact.id} has {fact.form!r}"
            )
        if missing := [name for name in fact.relation_gold if name not in texts]:
            raise ValueError(
                f"facts.jsonl: gold must be ids of passages.jsonl; {fact.id} names {missing[0]!r}"
            )
        facts.append(dataclasses.replace(fact, lexical_gold=tuple(_mentioning(fact, texts))))
    for name, ids in (("passages", [p["id"] for p in passages]), ("facts", [fact.id for fact in facts])):
        if twice := [key for key, count in Counter(ids).items() if count > 1]:
            raise ValueError(f"{name}.jsonl: ids must differ, {twice[0]!r} stands twice")
    return passages, facts


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def assemble(study: Study) -> tuple[list[Passage], list[Fact]]:
    """Draw the facts; then the passages: those that state them, that mention them, on the same subjects, and others."""
    fields = [passage for passage in factbook_passages(unpacked(FACTBOOK)) if len(passage["text"]) in WIDTH]
    named = [entity for entity in entities(unpacked(WORDNET)) if len(entity.text) in WIDTH]
    texts = {passage["id"]: passage["text"] for passage in fields}
    texts |= {entity.id: entity.text for entity in named}

    drawn: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    taken: set[str] = set()
    candidates = sorted(
        [*_factbook_facts(fields), *_wordnet_facts(named)], key=lambda fact: _draw(study, fact.id)
    )
    for fact in candidates:
        group = drawn[fact.relation, fact.form]
        (source,) = fact.relation_gold
        if len(group) < study.size.facts and source not in taken:
            group.append(fact)
            taken.add(source)
    facts = [fact for group in drawn.values() for fact in group]

    mentions = {fact.id: _mentioning(fact, texts)[:MENTIONS] for fact in facts if fact.form == "plain"}
    subjects = {fact.subject for fact in facts}
    related = {name for name in texts if name.split("/")[1] in subjects}
    chosen = dict.fromkeys(taken)
    chosen |= dict.fromkeys(name for names in mentions.values() for name in names)
    rest = sorted(texts.keys() - chosen.keys(), key=lambda name: (name not in related, _draw(study, name)))
    near, far = rest[: len(related)], rest[len(related) :]
    room = study.size.passages - len(chosen)
    chosen |= dict.fromkeys(near[: room // 2])
    chosen |= dict.fromkeys(far[: study.size.passages - len(chosen)])

    for fact in facts:
        if fact.form == "stripped":
            (source,) = fact.relation_gold
            texts[source] = texts[source].split(" - ", 1)[1]
    passages = [
        {"id": name, "text": texts[name]} for name in sorted(chosen, key=lambda name: _draw(study, name))
    ]
    kept = {passage["id"]: passage["text"] for passage in passages}
    return passages, [
        dataclasses.replace(fact, lexical_gold=tuple(_mentioning(fact, kept))) for fact in facts
    ]


def _factbook_facts(fields: Sequence[Passage]) -> Iterator[Fact]:
    found = []
    for passage in fields:
        _, place, field = passage["id"].split("/", 2)
        if field in RELATIONS and (answer := re.search(RELATIONS[field][0], passage["text"])):
            found.append(
                (passage["id"], NAMED[field], place, RELATIONS[field][1].format(place), answer[1].strip())
            )
    shared = Counter((relation, answer) for _, relation, _, _, answer in found)
    for source, relation, place, prompt, answer in found:
        unique = shared[relation, answer] == 1 and place not in answer
        # Which form: by the hash of the passage, so that a larger study holds a smaller one's.
        stripped = unique and hashlib.sha256(source.encode()).digest()[0] % 2 == 0
        form = "stripped" if stripped else "plain"
        yield Fact(f"{source}#{relation}", relation, form, place, prompt, " " + answer, (source,))


def _wordnet_facts(named: Sequence[Entity]) -> Iterator[Fact]:
    for entity in named:
        aliases = [name for name in entity.names if not _words(name) & _words(entity.text)]
        form, subject = ("alias", max(aliases, key=len)) if aliases else ("plain", entity.name)
        for relation, prompt, answer in entity.facts():
            if _words(answer) <= _words(entity.definition) and not _words(answer) & _words(subject):
                name = f"{entity.id}#{relation}#{answer}"
                yield Fact(name, relation, form, subject, prompt.format(subject), " " + answer, (entity.id,))


def _mentioning(fact: Fact, texts: dict[str, str]) -> list[str]:
    """Ids of the texts in which the subject's and the object's words stand, each as one phrase."""
    both = [re.compile(rf"\b{re.escape(words)}\b", re.IGNORECASE) for words in (fact.subject, fact.object)]
    near = [(name, text) for name, text in texts.items() if fact.subject in text]
    return [name for name, text in near if all(phrase.search(text) for phrase in both)]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _draw(study: Study, name: str) -> bytes:
    return hashlib.sha256(f"{study.seed}/{name}".encode()).digest()
