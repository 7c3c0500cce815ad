"""What :func:`trackstar.ekfac.influence` answers."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trackstar.attribution import Result
from trackstar.examples import Encoded, EncodedQuery


@dataclass(frozen=True)
class Influence:
    """The most influential training examples of each query, best first, and what their scores are sums of.

    Attributes:
        scores: I(m, q), (Q, k) float32.
        indices: (Q, k) int64, positions in the corpus.
        by_module: (Q, k, L) float32, each module's term of a score; they sum to it.
        by_token: for each query and result (T,) float32, the term of each of the example's tokens, summed over modules:
            what the gradient at that token's place contributes; they sum to the score.
        modules: the L modules' names.
        largest: True for proponents, False for opponents (the lowest scores, lowest first).
        queries: what was asked.
        corpus: the training examples.
    """

    scores: torch.Tensor
    indices: torch.Tensor
    by_module: torch.Tensor
    by_token: Sequence[Sequence[torch.Tensor]]
    modules: tuple[str, ...]
    largest: bool
    queries: Sequence[EncodedQuery]
    corpus: Sequence[Encoded]

    def text(self, index: int) -> str:
        """The text of example ``index``."""
        return self.corpus[index].text

    def id(self, index: int) -> str:
        """The id of example ``index``: its own, or its position in the corpus."""
        return self.corpus[index].id

    def to_jsonl(
        self,
        path: str | os.PathLike[str],
        *,
        query_set: str = "queries",
        opponents: "Influence | None" = None,
    ) -> None:
        """Write one line per query in the format of the paper's viewer, as :meth:`trackstar.Result.to_jsonl` does."""
        other = None if opponents is None else opponents._as_result()
        self._as_result().to_jsonl(path, query_set=query_set, opponents=other)

    def _as_result(self) -> Result:
        # A result asks its store for nothing but texts and ids.
        corpus: Any = self
        return Result(self.scores, self.indices, 0.0, self.largest, self.queries, corpus)
