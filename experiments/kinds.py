"""What kinds of passages the methods find (Figure 3 and Table A.1 of the paper), told apart by rule."""

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from examples.assets import WORDNET, unpacked
from examples.corpus import RELATIONS
from experiments import corpus
from experiments.corpus import NAMED, Fact, Passage
from experiments.ladder import TRACKSTAR, scored
from experiments.provenance import questions
from experiments.scores import ranking
from experiments.study import study
from experiments.wordnet import Entity, entities

KINDS = ("entails the fact", "same subject or object", "same relation", "name overlap", "other")
"""In the order in which they are tried: a passage is of the first that fits."""

METHODS = (TRACKSTAR, "V, R, norm", "EK-FAC", "cosine", "dot", "BM25", "embeddings")

TOP = 10


def main(argv: list[str] | None = None) -> int:
    """Sort every method's ten best into kinds, and all passages, which shows what chance would find."""
    here = study(__doc__, argv)
    passages, facts = corpus.load(here)
    asked = questions(here)
    fact_of = {fact.id: fact for fact in facts}
    related = passages_by_relation(facts, passages, entities(unpacked(WORDNET)))
    texts = {passage["id"]: passage["text"] for passage in passages}
    ids = list(texts)
    found = {method: [row[:TOP] for row in ranking(scored(here, method), ids)] for method in METHODS}
    found["every passage"] = [ids for _ in asked]
    results = [
        {"method": method}
        | shares(
            [
                kind_of(fact_of[question["id"]], name, texts[name], related)
                for question, row in zip(asked, rows, strict=True)
                for name in row
            ]
        )
        for method, rows in found.items()
    ]
    here.write("kinds", results, top=TOP, questions=len(asked))
    return 0


def kind_of(fact: Fact, passage: str, text: str, related: Mapping[str, set[str]]) -> str:
    """The first of ``KINDS`` that fits.

    A passage entails the fact if it states it or mentions subject and object, each as a phrase; it is of the same
    relation if it states this relation of anything; names overlap where a capitalized word of either, other than "The",
    stands in it.

    Args:
        fact: what was asked.
        passage: the passage's id.
        text: its text.
        related: ids of the passages that state each relation.
    """
    mentioned = [mentions(text, name) for name in (fact.subject, fact.object)]
    if passage in fact.relation_gold or all(mentioned):
        return KINDS[0]
    if any(mentioned):
        return KINDS[1]
    if passage in related[fact.relation]:
        return KINDS[2]
    names = {word for word in re.findall(r"\w{3,}", f"{fact.subject} {fact.object}") if word[0].isupper()}
    if (names - {"The"}) & set(re.findall(r"\w+", text)):
        return KINDS[3]
    return KINDS[4]


def mentions(text: str, name: str) -> bool:
    """Whether the name stands in the text as a phrase, in any case unless it is in capitals: OR is not "or"."""
    return bool(re.search(rf"\b{re.escape(name)}\b", text, 0 if name.isupper() else re.IGNORECASE))


def passages_by_relation(
    facts: Sequence[Fact], passages: Sequence[Passage], named: Sequence[Entity]
) -> dict[str, set[str]]:
    """Ids of the passages that state each relation of something: as facts say, the Factbook's fields and WordNet."""
    found: dict[str, set[str]] = {}
    for fact in facts:
        found.setdefault(fact.relation, set()).update(fact.relation_gold)
    by_id = {entity.id: entity for entity in named}
    for passage in passages:
        name, field = passage["id"], passage["id"].split("/", 2)[-1]
        if name in by_id:
            for relation, _, _ in by_id[name].facts():
                found.setdefault(relation, set()).add(name)
        elif field in NAMED and re.search(RELATIONS[field][0], passage["text"]):
            found.setdefault(NAMED[field], set()).add(name)
    return found


def shares(kinds: Sequence[str]) -> dict[str, Any]:
    """The share of each kind."""
    counts = Counter(kinds)
    return {kind: counts[kind] / len(kinds) for kind in KINDS}


if __name__ == "__main__":
    sys.exit(main())
