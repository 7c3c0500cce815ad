"""The study's ground truth: correlations by hand, subsets, and a training that a seed and a set determine."""

import sys

import numpy as np
import pytest
import torch

from experiments.lds import ceiling, datamodeling_scores, ranks, spearman
from experiments.removal import best_of, without
from experiments.retraining import Run, answers_of, half_subsets
from experiments.small_model import Setup, make_query, split_texts, train
from experiments.small_peers import _scores

SETUP = Setup(passages=12, queries=4, epochs=1, batch=4)


@pytest.fixture(scope="module")
def texts():
    passages = [
        {"id": f"factbook/Place{i}/Capital", "text": f"Place{i} - Capital: name: Town{i % 5}"}
        for i in range(20)
    ]
    return split_texts(passages, SETUP)


def test_ranks_of_equal_entries_are_their_mean():
    assert ranks(np.array([[3.0, 1.0, 3.0, 2.0]])).tolist() == [[2.5, 0.0, 2.5, 1.0]]


def test_spearman_by_hand():
    left = np.array([[1.0, 2.0, 3.0, 4.0]] * 3)
    right = np.array([[10.0, 20.0, 30.0, 99.0], [4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 2.0, 4.0]])
    # 1 − 6 Σd² / (n (n² − 1)): the last has d = (0, 1, 1, 0).
    assert spearman(left, right) == pytest.approx([1.0, -1.0, 0.8])
    assert spearman(left[:1], np.ones((1, 4))) == pytest.approx([0.0])


def test_scores_of_an_additive_truth_are_perfect():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(3, 10))
    inside = np.zeros((8, 10))
    for row, half in zip(inside, half_subsets(8, 10), strict=True):
        row[list(half)] = 1
    measured = 5 + 2 * inside @ scores.T
    assert datamodeling_scores(scores, inside, measured) == pytest.approx([1, 1, 1])
    assert datamodeling_scores(-scores, inside, measured) == pytest.approx([-1, -1, -1])


def test_ceiling_by_hand():
    seeds = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]])[:, :, None]
    # r = 0.8; two seeds' mean: 1.6 / 1.8.
    assert ceiling(seeds) == pytest.approx([(1.6 / 1.8) ** 0.5])
    assert ceiling(np.stack([seeds[0], -seeds[0]])) == pytest.approx([0.0])


def test_halves_are_halves_and_differ():
    halves = half_subsets(5, 11)
    assert all(len(set(half)) == 5 and list(half) == sorted(half) for half in halves)
    assert len(set(halves)) == 5
    assert half_subsets(3, 11) == halves[:3]


def test_question_is_what_follows_the_field(texts):
    query = make_query(
        {"id": "factbook/Place1/Capital", "text": "Place1 - Capital: name: Town1"}, texts.tokenizer
    )
    counted = [token for token in query["labels"] if token >= 0]
    assert texts.tokenizer.decode(counted) == " name: Town1"
    assert texts.tokenizer.decode(query["input_ids"]) == "Place1 - Capital: name: Town1"


def test_half_of_the_questions_are_about_passages_held_out(texts):
    trained = {passage["id"] for passage in texts.passages}
    assert [query["id"] in trained for query in texts.queries] == texts.seen == [True, True, False, False]


def test_training_is_a_function_of_set_and_seed(texts):
    passages = texts.encoded()
    weights = [
        torch.cat([p.detach().flatten() for p in train(passages, chosen, seed, SETUP)[0].parameters()])
        for chosen, seed in (((0, 1, 2, 3), 0), ((3, 2, 1, 0), 0), ((0, 1, 2, 3), 1), ((0, 1, 2, 4), 0))
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


def test_runs_that_are_kept_are_not_trained_again(texts, tmp_path, monkeypatch):
    runs = [Run((0, 1, 2), 0), Run((3, 4, 5), 0)]
    first = answers_of(tmp_path, texts, SETUP, runs[:1])
    both = answers_of(tmp_path, texts, SETUP, runs)
    assert both.shape == (2, 4)
    assert np.array_equal(both[:1], first)
    assert (both < 0).all()
    monkeypatch.setattr("experiments.retraining.train", None)
    assert np.array_equal(answers_of(tmp_path, texts, SETUP, runs), both)


def test_what_is_removed():
    scores = torch.tensor([[0.1, 0.9, 0.9, 0.5], [4.0, 3.0, 2.0, 1.0]])
    assert best_of(scores, 2) == [(1, 2), (0, 1)]
    assert without((0, 1, 2, 3), (1, 2)) == (0, 3)
    assert without((0, 1), ()) == (0, 1)


@pytest.fixture
def peer(tmp_path):
    """A bergson that notes how it is called and fails if told to, beside a Python that gives scores (2 of 3)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "bergson").write_text(
        '#!/bin/sh\necho "$@" >> calls\nif [ "$1" = fail ]; then echo why; exit 1; fi\n'
    )
    (folder / "python").write_text(
        f"#!{sys.executable}\nimport sys, numpy\nnumpy.save(sys.argv[-1], numpy.arange(6).reshape(3, 2))\n"
    )
    for file in folder.iterdir():
        file.chmod(0o755)
    return folder / "bergson"


def test_a_peers_commands_run_in_order_and_its_scores_are_those_of_queries(peer, tmp_path):
    found = _scores(peer, tmp_path / "run", [["build", "query", "--n", 16], ["score", "scores"]])
    assert found.tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    assert (tmp_path / "run" / "calls").read_text() == "build query --n 16\nscore scores\n"


def test_a_peers_failure_is_told_in_its_words(peer, tmp_path):
    with pytest.raises(RuntimeError, match=r"bergson failed: why"):
        _scores(peer, tmp_path / "run", [["fail"], ["score", "scores"]])
    assert (tmp_path / "run" / "calls").read_text() == "fail\n"
