"""What is said of proponents: their kinds, means of tail-patches, and texts with their parts in another order."""

import numpy as np
import pytest
import torch

from experiments.corpus import Fact
from experiments.kinds import KINDS, kind_of, passages_by_relation, shares
from experiments.order import FLIPPED, own, passage_forms, ratio, sentence_forms
from experiments.study import Study
from experiments.tail_patch import agreement, drawn, gains
from experiments.wordnet import Entity

FACT = Fact(
    "a#capital", "capital", "plain", "New Zealand", "The capital of New Zealand is", " Wellington", ("a",)
)
OTHER = Fact("b#capital", "capital", "plain", "Peru", "The capital of Peru is", " Lima", ("b",))


IN = Fact("c#part of", "part of", "alias", "IN", "IN is located in", " The Union", ("c",))

RELATED = {"capital": {"a", "b"}, "part of": set()}


@pytest.mark.parametrize(
    ("fact", "passage", "text", "kind"),
    [
        (FACT, "a", "the city of the winds", "entails the fact"),
        (FACT, "x", "wellington is where New Zealand is governed from", "entails the fact"),
        (FACT, "x", "New Zealand has sheep", "same subject or object"),
        (FACT, "x", "Wellingtons are boots", "other"),
        (FACT, "b", "Peru - Capital: name: Lima", "same relation"),
        (FACT, "x", "a novel of New York", "name overlap"),
        (FACT, "x", "a new day", "other"),
        (IN, "x", "the sea is in it", "other"),
        (IN, "x", "The sea is IN it", "same subject or object"),
        (IN, "x", "The sea", "other"),
        (IN, "x", "Union Jack", "name overlap"),
    ],
)
def test_kind_of_a_passage(fact, passage, text, kind):
    assert kind_of(fact, passage, text, RELATED) == kind


def test_passages_state_relations_whether_they_are_asked_for_or_not():
    poet = Entity("wordnet/1", ("Petrarch",), "an Italian poet (1304-1374)", True, ("poet",), ())
    texts = {
        "wordnet/1": poet.text,
        "factbook/Peru/Capital": "Capital: name: Lima; geographic coordinates: 12 03 S",
        "factbook/Nauru/Capital": "Nauru - Capital: no official capital",
        "factbook/Peru/Terrain": "Peru - Terrain: plain",
    }
    passages = [{"id": name, "text": text} for name, text in texts.items()]
    assert passages_by_relation([IN], passages, [poet]) == {
        "part of": {"c"},
        "year of birth": {"wordnet/1"},
        "occupation": {"wordnet/1"},
        "capital": {"factbook/Peru/Capital"},
    }


def test_shares_by_hand():
    found = shares(["other", "same relation", "other", "other"])
    assert found == dict.fromkeys(KINDS, 0) | {"other": 0.75, "same relation": 0.25}


LISTS = {"TrackStar": [["a", "b"], ["c", "d", "e"]], "gold": [["b"], ["e"]]}
CHANGES = [{"a": 0.1, "b": 0.3}, {"c": 0.2, "d": 0.4, "e": 0.6}]


def test_tail_patch_means_are_over_the_passages_that_there_are():
    *found, idle = gains(LISTS, CHANGES, [0.1, 0.0])
    assert [(row["method"], row["k"]) for row in found] == [("TrackStar", 1), ("TrackStar", 3), ("gold", 1)]
    assert [row["change"]["value"] for row in found] == pytest.approx([0.15, 0.3, 0.45])
    assert [row["above no passage"]["value"] for row in found] == pytest.approx([0.1, 0.25, 0.4])
    assert [row["TrackStar above it"]["value"] for row in found] == pytest.approx([0.0, 0.0, -0.3])
    assert (idle["method"], idle["change"]["value"]) == ("no passage", pytest.approx(0.05))


def test_agreement_is_over_the_passages_that_were_tried():
    scores = [{"a": 1.0, "b": 2.0, "untried": 9.0}, {"c": 3.0, "d": 2.0, "e": 1.0}]
    assert agreement(scores, CHANGES)["value"] == pytest.approx(0.0)  # The mean of 1 and −1.
    assert agreement(scores[:1], CHANGES[:1])["value"] == pytest.approx(1.0)


def test_more_questions_are_drawn_after_the_first(tmp_path):
    here = Study(tmp_path, "small", 0)
    assert drawn(here, 10, 6)[:4] == drawn(here, 10, 4)
    assert sorted(drawn(here, 10, 12)) == list(range(10))
    assert drawn(Study(tmp_path, "small", 1), 10, 10) != drawn(here, 10, 10)


def test_every_relation_can_be_flipped():
    for relation, sentence in FLIPPED.items():
        said = sentence.format(subject="SUBJECT", object="OBJECT")
        assert 0 <= said.index("OBJECT") < said.index("SUBJECT"), relation


def test_forms_of_a_fact():
    assert sentence_forms(OTHER) == [
        "The capital of Peru is Lima",
        "Lima is the capital of Peru",
        "The capital of Peru is",
    ]
    assert passage_forms(OTHER, "Peru - Capital: name: Lima; old: Limana") == [
        "Peru - Capital: name: Lima; old: Limana",
        "Capital: name: Lima; old: Limana - Peru",
        "Peru - Capital: name:; old: Limana",
    ]
    assert passage_forms(OTHER, "Peru: Lima is its capital")[1:] == [
        "Lima is its capital: Peru",
        "Peru: is its capital",
    ]
    assert passage_forms(OTHER, "Capital: name: Lima") is None
    assert passage_forms(OTHER, "Peru - Capital: name: Cuzco") is None


def test_own_texts_of_each_question():
    values = torch.arange(12.0).view(2, 6)
    assert own(values).tolist() == [[0, 1, 2], [9, 10, 11]]


def test_ratio_is_of_the_means():
    reference = np.array([1.0, 2.0, 3.0])
    found = ratio(np.array([0.0, 1.0, 0.5]), reference)
    assert found.value == pytest.approx(0.25)
    assert found.low < 0.25 < found.high
    exact = ratio(reference / 2, reference)
    assert (exact.low, exact.high) == pytest.approx((0.5, 0.5))
