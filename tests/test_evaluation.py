"""MRR, Recall@10 and their intervals, against values worked out by hand; and the command that prints them."""

import json
import math

import numpy as np
import pytest
from trackstar.cli import app
from trackstar.evaluation.metrics import best_ranks, estimate, evaluate, ids_in
from typer.testing import CliRunner

QUERIES = [
    {"prompt": "a", "target": "b", "gold": ["3", "7"], "relation": "capital"},
    {"prompt": "a", "target": "b", "gold": ["0"], "relation": "capital"},
    {"prompt": "a", "target": "b", "gold": ["99"], "metadata": {"relation": "currency"}},
    {"prompt": "a", "target": "b", "gold": ["12", "x"]},
]
ORDER = [str(i) for i in range(20)]
ANSWERS = [ORDER, ORDER, ORDER, ORDER]


def test_the_best_ranked_gold_counts():
    np.testing.assert_array_equal(best_ranks(ANSWERS, QUERIES), [4, 1, math.inf, 13])


def test_figures_over_all_and_by_field():
    overall, capitals, currencies = evaluate({"m": ANSWERS}, QUERIES, by=["relation"])
    assert (overall.queries, capitals.queries, currencies.queries) == (4, 2, 1)
    assert overall.mrr.value == pytest.approx((1 / 4 + 1 + 0 + 1 / 13) / 4)
    assert overall.recall.value == 0.5  # rank 4 and rank 1; 13 is beyond 10
    assert (capitals.field, capitals.value) == ("relation", "capital")
    assert capitals.mrr.value == pytest.approx(5 / 8)
    assert capitals.recall.value == 1
    assert (currencies.mrr.value, currencies.recall.value) == (0, 0)


def test_the_bootstrap_of_two_values_is_binomial():
    # The mean of n resampled zeros and ones is binomial: of 100 with half ones, 95% lies within 0.5 ± 0.1.
    found = estimate(np.arange(100) % 2)
    assert found.value == 0.5
    assert found.low == pytest.approx(0.40, abs=0.011)
    assert found.high == pytest.approx(0.60, abs=0.011)
    assert found == estimate(np.arange(100) % 2)
    constant = estimate(np.full(5, 0.25))
    assert (constant.low, constant.high) == (0.25, 0.25)


@pytest.mark.parametrize("gold", [None, [], "3", {}])
def test_queries_without_gold_are_named(gold):
    with pytest.raises(ValueError, match=r'queries\[1\] must have "gold"'):
        best_ranks([ORDER] * 2, [{"gold": ["1"]}, {"gold": gold}])


def test_as_many_answers_as_queries():
    with pytest.raises(ValueError, match="as many as the queries, 4; got 3"):
        best_ranks(ANSWERS[:3], QUERIES)


def test_lines_that_are_no_results_are_named():
    with pytest.raises(ValueError, match="line 2"):
        ids_in(['{"proponent_ids": [1, "a"]}', '{"proponents": []}'])


def test_the_command_measures_results(tmp_path):
    (tmp_path / "queries.jsonl").write_text("\n".join(json.dumps(query) for query in QUERIES))
    lines = [json.dumps({"proponent_ids": answer}) for answer in ANSWERS]
    (tmp_path / "found.jsonl").write_text("\n".join(lines))
    given = ["--results", f"mine={tmp_path}/found.jsonl", "--by", "relation", "--out", f"{tmp_path}/out.json"]
    done = CliRunner().invoke(app, ["evaluate", "--queries", f"{tmp_path}/queries.jsonl", *given])
    assert done.exit_code == 0, done.output
    assert "mine" in done.output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [figure["value"] for figure in figures] == ["", "capital", "currency"]
    assert figures[0]["mrr"]["value"] == pytest.approx((1 / 4 + 1 + 1 / 13) / 4)
    assert figures[0]["recall"]["value"] == 0.5


def test_the_command_wants_a_store_or_results(tmp_path):
    done = CliRunner().invoke(app, ["evaluate", "--queries", f"{tmp_path}/queries.jsonl"])
    assert done.exit_code == 2
