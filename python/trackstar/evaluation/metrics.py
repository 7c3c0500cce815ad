"""How well a method finds the right examples: MRR and Recall@10, with bootstrap intervals, by method and by field."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trackstar.scoring.result import Result

DEPTH = 1000
"""Results looked at for each query: gold beyond them counts as not found, its reciprocal rank as 0."""

RECALL_AT = 10

RESAMPLES = 2000

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over queries, with the interval that the bootstrap gives it.

    Attributes:
        value: the mean.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a method reaches on a group of queries.

    Attributes:
        method: its name.
        field: of the queries, by which the group was formed; "" for all of them.
        value: of the field.
        queries: in the group.
        mrr: mean of 1/rank of the best ranked gold example, 0 where none was found.
        recall: share of queries with a gold example among the first ``RECALL_AT``.
    """

    method: str
    field: str
    value: str
    queries: int
    mrr: Estimate
    recall: Estimate


def evaluate(
    ranked: Mapping[str, Sequence[Sequence[str]]],
    queries: Sequence[Mapping[str, Any]],
    *,
    by: Sequence[str] = (),
    seed: int = 0,
) -> list[Quality]:
    """MRR and Recall@10 of every method, over all queries and by the values of fields.

    As in the paper, an answer's best ranked gold example counts, however many there are. Intervals come from
    resampling queries with replacement, ``RESAMPLES`` times: percentiles that hold ``LEVEL``.

    Args:
        ranked: for each method, for each query, the ids it found, best first.
        queries: each with "gold", a list of ids.
        by: fields of the queries, or of their "metadata", to group by; a query without one is in no group.
        seed: of the resampling.

    Raises:
        ValueError: a query has no gold, or a method's answers are not as many as the queries.

    Source: TrackStar, arXiv 2410.17413, section 5 (metrics of attribution).
    """
    groups: dict[tuple[str, str], list[int]] = {("", ""): list(range(len(queries)))}
    for field in by:
        for i, query in enumerate(queries):
            value = query.get(field, (query.get("metadata") or {}).get(field))
            if value is not None:
                groups.setdefault((field, str(value)), []).append(i)
    found = []
    for method, answers in ranked.items():
        ranks = best_ranks(answers, queries)
        reciprocal, hit = 1 / ranks, ranks <= RECALL_AT
        for (field, value), members in groups.items():
            mrr, recall = (estimate(values[members], seed) for values in (reciprocal, hit))
            found.append(Quality(method, field, value, len(members), mrr, recall))
    return found


def best_ranks(answers: Sequence[Sequence[str]], queries: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The rank, from 1, of each query's best ranked gold example; ∞ where none was found. (Q,) float64.

    Raises:
        ValueError: a query has no gold, or the answers are not as many as the queries.
    """
    if len(answers) != len(queries):
        raise ValueError(f"answers must be as many as the queries, {len(queries)}; got {len(answers)}")
    ranks = np.full(len(queries), math.inf)
    for i, (answer, query) in enumerate(zip(answers, queries, strict=True)):
        gold = query.get("gold")
        if not isinstance(gold, Sequence) or isinstance(gold, str) or not gold:
            raise ValueError(f'queries[{i}] must have "gold", a list of at least one id, got {gold!r}')
        wanted = {str(name) for name in gold}
        ranks[i] = next((rank for rank, name in enumerate(answer, start=1) if name in wanted), math.inf)
    return ranks


def estimate(values: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of values (n,), and the percentile bootstrap's interval of it."""
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def ids_of(result: Result) -> list[list[str]]:
    """Ids of the examples that a result found, best first, for each query."""
    return [[result.corpus.id(index) for index in found] for found in result.indices.tolist()]


def ids_in(lines: Iterable[str]) -> list[list[str]]:
    """The same from the lines of a file that ``Result.to_jsonl`` wrote.

    Raises:
        ValueError: a line is not of that form.
    """
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append([str(name) for name in json.loads(line)["proponent_ids"]])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'results must have "proponent_ids" on every line, line {number} has not: {line[:60]!r}'
            ) from None
    return found
