"""The study's own arithmetic: its dense scores against the engine's, its questions, its page."""

import pytest
import torch
from synthetic import make_store
from trackstar.curvature import choose_mixing
from trackstar.scoring.attribution import score_rows

from experiments.corpus import _mentioning, _wordnet_facts
from experiments.document import Document
from experiments.quality import with_gold
from experiments.scores import automatic_mixing, ranking, scores
from experiments.stores import passage_rows
from experiments.wordnet import entities

N, L, D, Q = 60, 3, 16, 5


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(L, D, generator=generator) * 3 + 0.1
    return tuple(torch.randn(n, L, D, generator=generator) * spread for n in (N, Q))


@pytest.fixture(scope="module")
def store(tmp_path_factory, rows):
    return make_store(tmp_path_factory.mktemp("store") / "s", [rows[0]], dtype="float32")


@pytest.mark.parametrize("mixing", [0.0, 0.4, 0.95])
def test_dense_scores_are_the_engines(rows, store, mixing):
    passages, questions = rows
    values, indices, _ = score_rows(store, questions, k=N, mixing=mixing)
    mine = scores(passages, questions, mixing=mixing)
    torch.testing.assert_close(mine.gather(1, indices), values, rtol=0, atol=2e-5)


def test_rows_come_back_from_a_store_as_they_were(rows, store):
    torch.testing.assert_close(passage_rows(store), rows[0], rtol=1e-4, atol=1e-4)


def test_mixing_is_the_engines(rows, store):
    wanted = choose_mixing(rows[1], store.curvature.eigenvalues)
    assert automatic_mixing(*rows) == pytest.approx(wanted, rel=1e-5)


def test_scores_without_norm_and_curvature(rows):
    passages, questions = rows
    flat = questions.flatten(1) @ passages.flatten(1).T
    torch.testing.assert_close(
        scores(passages, questions, whitened=False, unit_norm=False), flat, rtol=1e-4, atol=1e-4
    )
    cosine = flat / passages.flatten(1).norm(dim=1) / questions.flatten(1).norm(dim=1)[:, None]
    torch.testing.assert_close(scores(passages, questions, whitened=False), cosine, rtol=1e-4, atol=1e-5)


def test_ties_are_ranked_in_order():
    assert ranking(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), ["a", "b", "c", "d"]) == [["b", "c", "a", "d"]]


NOUNS = """  1 a line of the licence
00000001 15 n 02 Christiania 0 Oslo 0 002 @i 00000002 n 0000 #p 00000003 n 0000 | a city of Norway; a seat; "we went"
00000002 15 n 01 national_capital 0 000 | the capital city of a nation
00000003 15 n 01 Norway 0 001 @i 00000002 n 0000 | a constitutional monarchy in northern Europe
00000004 18 n 02 Twain 0 Mark_Twain 0 001 @i 00000005 n 0000 | United States writer (1835-1910)
00000005 18 n 01 writer 0 000 | one who writes
"""


@pytest.fixture
def named(tmp_path):
    folder = tmp_path / "usr/share/wordnet"
    folder.mkdir(parents=True)
    (folder / "data.noun").write_text(NOUNS, encoding="latin-1")
    return entities(tmp_path)


def test_entities_of_wordnet(named):
    oslo, norway, twain = named
    assert oslo.text == "Christiania: a city of Norway; a seat"
    assert (oslo.kinds, oslo.wholes) == (("national capital",), ("Norway",))
    assert norway.text == "Norway: a constitutional monarchy in northern Europe"
    assert twain.text == "Mark Twain: United States writer (1835-1910)"


def test_facts_are_asked_by_a_name_that_shares_no_word_with_the_passage_where_there_is_one(named):
    facts = {fact.relation: fact for fact in _wordnet_facts(named)}
    assert set(facts) == {"part of", "nationality of a person", "year of birth", "occupation"}
    assert (facts["part of"].form, facts["part of"].prompt) == ("alias", "Oslo is located in")
    assert (facts["year of birth"].form, facts["year of birth"].target) == ("plain", " 1835")
    assert facts["occupation"].relation_gold == ("wordnet/00000004",)
    texts = {"a": "Twain, Mark", "b": "Mark Twain was a writer", "c": "Mark Twain was a rewriter"}
    assert _mentioning(facts["occupation"], texts) == ["b"]


def test_questions_without_that_gold_are_left_out():
    questions = [
        {"gold": ["a"], "lexical_gold": []},
        {"gold": ["b"], "lexical_gold": ["b", "c", "d"]},
    ]
    kept, asked = with_gold(questions, "lexical")
    assert kept == [1]
    assert (asked[0]["gold"], asked[0]["gold passages"]) == (["b", "c", "d"], "3 or more")


def test_pages_are_the_same_in_both_languages(tmp_path):
    page = Document("A & B")
    page.text("1 < 2")
    page.table(["x", "y"], [["a|b", 0.12345], [1, "<"]])
    page.write(tmp_path, "page")
    assert (tmp_path / "page.md").read_text() == (
        "# A & B\n\n1 < 2\n\n| x | y |\n|---|---|\n| a\\|b | 0.123 |\n| 1 | < |\n"
    )
    written = (tmp_path / "page.html").read_text()
    assert "<h1>A &amp; B</h1>" in written
    assert "<td>a|b</td><td>0.123</td>" in written
    assert "<td>&lt;</td>" in written
