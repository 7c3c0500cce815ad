"""The study's own arithmetic: its dense scores against the engine's, its questions, its page."""

import json
import random

import pytest
import torch
from conftest import VOCABULARY
from synthetic import make_store
from trackstar.curvature import choose_mixing
from trackstar.scoring.attribution import score_rows

from experiments.corpus import Fact, _mentioning, _wordnet_facts, load
from experiments.document import Document
from experiments.opponents import sums_by_place
from experiments.provenance import answers, batches
from experiments.quality import with_gold
from experiments.scores import automatic_mixing, ranking, scores
from experiments.stores import passage_rows
from experiments.study import chosen, parser
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


def test_passages_that_were_not_trained_on_are_scored_with_the_curvature_of_those_that_were(rows):
    passages, questions = rows
    whole = scores(passages, questions, mixing=0.4)
    part = scores(passages[:7], questions, mixing=0.4, trained=passages)
    torch.testing.assert_close(part, whole[:, :7], rtol=1e-6, atol=1e-6)


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


@pytest.fixture
def own(tmp_path):
    """Writes a corpus of the user's, and gives the study of it."""

    def write(facts):
        folder = tmp_path / "own"
        folder.mkdir(exist_ok=True)
        passages = [{"id": "a", "text": "Oslo lies in Norway"}, {"id": "b", "text": "Oslo, a city of Norway"}]
        for name, lines in (("passages", passages), ("facts", facts)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return chosen(parser("").parse_args(["--work", str(tmp_path), "--corpus", str(folder)]))

    return write


FACT = {"subject": "Oslo", "prompt": "Oslo is located in", "target": " Norway", "gold": ["a"]}


def test_a_corpus_of_ones_own(own, tmp_path):
    here = own([FACT, FACT | {"id": "x", "relation": "part of", "form": "alias"}])
    passages, facts = load(here)
    assert here.folder == tmp_path / "small-0-own"
    assert [passage["id"] for passage in passages] == ["a", "b"]
    assert [(f.id, f.relation, f.form) for f in facts] == [
        ("fact-1", "fact", "plain"),
        ("x", "part of", "alias"),
    ]
    assert (facts[0].relation_gold, facts[0].lexical_gold) == (("a",), ("a", "b"))


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ([FACT | {"gold": ["c"]}], "fact-1 names 'c'"),
        ([FACT | {"form": "sung"}], "fact-1 has 'sung'"),
        ([FACT | {"id": "x"}] * 2, "'x' stands twice"),
    ],
)
def test_a_corpus_of_ones_own_is_checked(own, facts, problem):
    with pytest.raises(ValueError, match=problem):
        load(own(facts))


def test_batches_hold_every_passage_once_and_are_nearly_of_one_length():
    lengths = [i % 40 + 1 for i in range(1000)]
    found = batches(lengths, 16, random.Random(0))
    assert sorted(i for members in found for i in members) == list(range(1000))
    padded_tokens = sum(len(members) * max(lengths[i] for i in members) for members in found)
    assert padded_tokens < 1.1 * sum(lengths)
    assert found != batches(lengths, 16, random.Random(1))


def test_answers_are_those_of_one_question_at_a_time(llama):
    def tokenizer(text, **_):
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

    facts = [
        Fact(f"{i}", "part of", "plain", "", prompt, target, ())
        for i, (prompt, target) in enumerate(
            [("Oslo is in", " Norway"), ("Is", " it"), ("The capital of Norway", " O")]
        )
    ]
    for fact, (log_p, right) in zip(facts, answers(llama, tokenizer, facts), strict=True):
        before, after = (tokenizer(text)["input_ids"] for text in (fact.prompt, fact.target))
        given, wanted, hits = torch.tensor([before]), 0.0, True
        for token in after:
            with torch.no_grad():
                logits = llama(input_ids=given).logits[0, -1]
            wanted += logits.log_softmax(0)[token].item()
            hits &= bool(logits.argmax() == token)
            given = torch.cat([given, torch.tensor([[token]])], dim=1)
        assert log_p == pytest.approx(wanted, rel=1e-5)
        assert right == hits


def test_terms_are_added_up_by_what_is_predicted():
    text = "Oslo: a city"
    spans = [(0, 2), (2, 4), (4, 5), (5, 7), (7, 12)]
    terms = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    assert sums_by_place(terms, spans, text, "city") == {"heading": 11.0, "answer": 1000.0, "else": 10100.0}
    assert sums_by_place(terms, spans, text, "port") == {"heading": 11.0, "answer": 0.0, "else": 11100.0}


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
