"""How well a ranking finds the gold: the study's figures, by kind of gold and by group of questions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from trackstar.evaluation.metrics import Estimate, best_ranks, estimate, evaluate

Questions = Sequence[Mapping[str, Any]]
Ranking = Sequence[Sequence[str]]

BY = ("relation", "form", "knows", "knew", "gold passages", "passages with the answer")
"""Fields of the questions that figures are given by."""

GOLD = {"relation": "gold", "lexical": "lexical_gold"}
"""Kinds of gold, and the fields that hold them."""


def measured(
    rankings: Mapping[str, Ranking], questions: Questions, by: Sequence[str] = BY
) -> list[dict[str, Any]]:
    """MRR and Recall@10 of every method: for each kind of gold, over the questions that have any."""
    found = []
    for kind in GOLD:
        kept, asked = with_gold(questions, kind)
        ranked = {name: [ranking[i] for i in kept] for name, ranking in rankings.items()}
        found += [{"gold": kind} | dataclasses.asdict(quality) for quality in evaluate(ranked, asked, by=by)]
    return found


def with_gold(questions: Questions, kind: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Positions of the questions that have gold of this kind, and these questions with it as their gold."""
    kept = [i for i, question in enumerate(questions) if question[GOLD[kind]]]
    asked = []
    for i in kept:
        gold = questions[i][GOLD[kind]]
        count = f"{len(gold)}" if len(gold) < 3 else "3 or more"
        asked.append({**questions[i], "gold": gold, "gold passages": count})
    return kept, asked


def reciprocal_ranks(ranking: Ranking, questions: Questions) -> np.ndarray:
    """1/rank of each question's best ranked relation gold, (Q,)."""
    return 1 / best_ranks(ranking, questions)


def mrr(ranking: Ranking, questions: Questions) -> dict[str, float]:
    """MRR on relation gold with its interval."""
    return dataclasses.asdict(estimate(reciprocal_ranks(ranking, questions)))


def difference(ranking: Ranking, other: Ranking, questions: Questions) -> Estimate:
    """By how much the MRR of one ranking is above another's, with the paired bootstrap's interval."""
    return estimate(reciprocal_ranks(ranking, questions) - reciprocal_ranks(other, questions))
