"""Kinds of proponents, by sentences of each."""

import pytest

from experiments.corpus import Fact
from experiments.kinds import KINDS, kind_of, passages_by_relation, shares

FACT = Fact(
    "a#capital", "capital", "plain", "New Zealand", "The capital of New Zealand is", " Wellington", ("a",)
)
OTHER = Fact("b#capital", "capital", "plain", "Peru", "The capital of Peru is", " Lima", ("b",))


@pytest.mark.parametrize(
    ("passage", "text", "kind"),
    [
        ("a", "the city of the winds", "entails the fact"),
        ("x", "wellington is where New Zealand is governed from", "entails the fact"),
        ("x", "New Zealand has sheep", "same subject or object"),
        ("x", "Wellingtons are boots", "other"),
        ("b", "Peru - Capital: name: Lima", "same relation"),
        ("x", "a novel of New York", "name overlap"),
        ("x", "a new day", "other"),
    ],
)
def test_kind_of_a_passage(passage, text, kind):
    assert kind_of(FACT, passage, text, passages_by_relation([FACT, OTHER])) == kind


def test_shares_by_hand():
    found = shares(["other", "same relation", "other", "other"])
    assert found == dict.fromkeys(KINDS, 0) | {"other": 0.75, "same relation": 0.25}
