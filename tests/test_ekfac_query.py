"""Short lists, candidates and passes: whatever the way, the same answers; and what influence() refuses."""

import json
import sys

import pytest
import torch
from conftest import make_examples
from trackstar.ekfac import fit_factors, influence
from trackstar.ekfac import query as query_module
from trackstar.ekfac.prefilter import candidates_of
from trackstar.gradients.examples import encode_examples

pytestmark = pytest.mark.usefixtures("unsynced")

LENGTHS = (5, 9, 17, 3, 30, 2, 12, 9, 9, 1, 0)
QUERIES = [
    {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, 4, 5], "id": "first"},
    {"input_ids": [7, 8, 9, 1], "labels": [-100, -100, 9, -100]},
    {"input_ids": list(range(20)), "labels": [-100] * 19 + [19]},
]


@pytest.fixture
def given():
    return make_examples(LENGTHS)


@pytest.fixture
def factors(llama, given, tmp_path):
    return fit_factors(tmp_path / "factors", llama, given)


def test_examples_without_a_gradient_score_nothing(factors, llama, given):
    result = influence(factors, llama, given, QUERIES, k=len(given))
    for q in range(len(QUERIES)):
        scores = dict(zip(result.indices[q].tolist(), result.scores[q].tolist(), strict=True))
        assert sorted(scores) == list(range(len(given)))
        assert (scores[9], scores[10]) == (0, 0)
        # Ties go to the smaller index.
        assert result.indices[q].tolist().index(9) < result.indices[q].tolist().index(10)


def test_opponents_are_the_other_end(factors, llama, given):
    best = influence(factors, llama, given, QUERIES, k=len(given))
    worst = influence(factors, llama, given, QUERIES, k=3, largest=False)
    ascending = best.scores.sort(dim=1).values
    torch.testing.assert_close(worst.scores, ascending[:, :3], rtol=1e-4, atol=1e-3)
    assert (worst.scores.diff(dim=1) >= 0).all()
    assert (best.scores.diff(dim=1) <= 0).all()


def test_queries_in_any_number_of_passes(factors, llama, given, capsys):
    together = influence(factors, llama, given, QUERIES, k=4)
    assert "33 pairs" in capsys.readouterr().err
    apart = influence(factors, llama, given, QUERIES, k=4, memory=1)
    assert "in 3 passes" in " ".join(capsys.readouterr().err.split())
    assert torch.equal(together.indices, apart.indices)
    torch.testing.assert_close(together.scores, apart.scores, rtol=1e-4, atol=1e-4)


def test_the_best_are_scored_anew(factors, llama, given):
    """A short list of rank 1 is in another order than the answer, and its scores are those of full rank."""
    full = influence(factors, llama, given, QUERIES, k=len(given))
    scores = [dict(zip(*(t[q].tolist() for t in (full.indices, full.scores)), strict=True)) for q in range(3)]
    for rescored in (1, 5):
        result = influence(factors, llama, given, QUERIES, k=3, rank=1, rescored=rescored)
        for q in range(3):
            for index, score in zip(result.indices[q].tolist(), result.scores[q].tolist(), strict=True):
                assert score == pytest.approx(scores[q][index], rel=1e-4, abs=1e-4)
            assert result.scores[q].tolist() == sorted(result.scores[q].tolist(), reverse=True)


def test_windows_of_the_corpus_make_no_difference(factors, llama, given, monkeypatch):
    whole = influence(factors, llama, given, QUERIES, k=4, rescored=6)
    monkeypatch.setattr(query_module, "WINDOW", 2)
    parts = influence(factors, llama, given, QUERIES, k=4, rescored=6)
    assert torch.equal(whole.indices, parts.indices)
    torch.testing.assert_close(whole.scores, parts.scores, rtol=1e-4, atol=1e-4)


def test_candidates_share_rare_tokens_with_the_query():
    given = [[1, 1, 1, 50], [1, 2, 3], [60, 1], [1, 50, 60], [1, 1], [], [70, 80]]
    examples = encode_examples([{"input_ids": ids} for ids in given], None)
    queries = encode_examples([{"input_ids": ids} for ids in ([1, 50], [60], [99])], None)
    found = [chosen.tolist() for chosen in candidates_of(queries, examples, 2)]
    assert found == [[0, 3], [2, 3], [0, 1]]  # nothing in common: ties to the smaller


def test_only_candidates_are_scored(factors, llama, given):
    full = influence(factors, llama, given, QUERIES, k=len(given))
    chosen = candidates_of(*(encode_examples(side, None) for side in (QUERIES, given)), 4)
    assert len({tuple(c.tolist()) for c in chosen}) > 1
    for memory in (1 << 30, 1):
        result = influence(factors, llama, given, QUERIES, k=4, candidates=4, memory=memory)
        for q in range(len(QUERIES)):
            wanted = [i for i in full.indices[q].tolist() if i in chosen[q]]
            assert result.indices[q].tolist() == wanted


def test_candidates_need_bm25s(factors, llama, given, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"choosing 4 candidates of 11 examples needs bm25s: pip install"):
        influence(factors, llama, given, QUERIES, k=4, candidates=4)
    assert influence(factors, llama, given, QUERIES, k=4, candidates=None).scores.shape == (3, 4)


def test_results_in_the_viewer_s_format(factors, llama, given, tmp_path):
    texts = [example | {"text": f"text {i}", "id": f"id {i}"} for i, example in enumerate(given)]
    best, worst = (influence(factors, llama, texts, QUERIES, k=2, largest=side) for side in (True, False))
    best.to_jsonl(tmp_path / "out.jsonl", query_set="mine", opponents=worst)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["example_id"] for line in lines] == ["first", "1", "2"]
    for q, line in enumerate(lines):
        assert line["query_set"] == "mine"
        for name, result in (("proponent", best), ("opponent", worst)):
            indices = result.indices[q].tolist()
            assert line[f"{name}s"] == [f"text {i}" for i in indices]
            assert line[f"{name}_ids"] == [f"id {i}" for i in indices]
            assert line[f"{name}_scores"] == result.scores[q].tolist()


@pytest.mark.parametrize("output", ["margin", "logit"])
def test_queries_of_another_output_function(factors, llama, given, output):
    """Of the logit, the gradient is that of nll without its expectation; neither is a multiple of the other."""
    loss, other = (influence(factors, llama, given, QUERIES, k=11, output=name) for name in ("loss", output))
    assert not torch.allclose(loss.scores, other.scores, rtol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k must be an int from 1 to 11 \(the examples scored\), got 0"),
        ({"k": 12}, "k must be an int from 1 to 11"),
        ({"k": 3, "candidates": 2}, "k must be an int from 1 to 2"),
        ({"candidates": 0}, "candidates must be an int of at least 1"),
        ({"rank": 0}, "rank must be an int of at least 1, got 0"),
        ({"rescored": 1.5}, "rescored must be an int of at least 1, got 1.5"),
        ({"memory": True}, "memory must be an int of at least 1, got True"),
        ({"damping": 0}, "damping must be a number above 0, got 0"),
        ({"damping": float("nan")}, "damping must be a number above 0"),
        ({"damping": "auto"}, "damping must be a number above 0, got 'auto'"),
        ({"output": "fun"}, "output must be one of"),
    ],
)
def test_bad_arguments(factors, llama, given, options, message):
    with pytest.raises(ValueError, match=message):
        influence(factors, llama, given, QUERIES, **options)


def test_tokens_of_another_model(factors, llama, given):
    with pytest.raises(ValueError, match=r"queries\[0\] must hold token ids from 0 to 96"):
        influence(factors, llama, given, [{"input_ids": [1, 97], "labels": [-100, 97]}])
