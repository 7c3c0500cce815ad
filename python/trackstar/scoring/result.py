"""What every method answers: the training examples behind a model's answers, best first."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from trackstar.gradients.examples import Encoded, EncodedQuery


class Corpus(Protocol):
    """Training examples that can be shown: a :class:`~trackstar.storage.store.Store`, or :class:`Examples`."""

    def text(self, index: int) -> str:
        """The text of example ``index``."""

    def id(self, index: int) -> str:
        """The id of example ``index``: its own, or its position in the corpus."""

    def tokens(self, index: int) -> np.ndarray:
        """The token ids (T,) int32 of example ``index``."""


class Examples:
    """Encoded examples as a corpus."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self.encoded = encoded

    def text(self, index: int) -> str:
        """The text of example ``index``."""
        return self.encoded[index].text

    def id(self, index: int) -> str:
        """The id of example ``index``: its own, or its position in the corpus."""
        return self.encoded[index].id

    def tokens(self, index: int) -> np.ndarray:
        """The token ids (T,) int32 of example ``index``."""
        return self.encoded[index].tokens


@dataclasses.dataclass(frozen=True)
class Result:
    """The most influential training examples of each query, best first.

    Attributes:
        scores: (Q, k) float32, as the method defines them. TrackStar's are cosines: from −1 to 1.
        indices: (Q, k) int64, positions in the corpus.
        queries: what was asked.
        corpus: where the examples' texts and ids are: the store, if there is one.
        method: what computed the scores.
        mixing: λ, the share of the queries' own curvature in R; None for methods without.
        largest: True for proponents, False for opponents (the lowest scores, lowest first).
        opponents: the same queries' lowest scores, where they were asked for too.
        blocks: names of the L layer blocks, or modules, that ``by_block`` is about; () without.
        by_block: (Q, k, L) float32, each block's term of a score, where it was asked for; they sum to the score.
        by_token: for each query and result (T,) float32, each token's term of the score, where it was asked for: what
            the gradient at that token's place contributes; they sum to the score.
        rescored: (Q,) int64, where int8, int4 or sign rows have a wider copy: how many of the corpus's examples were
            scored from that for each query. The scores are the wider rows', exactly; codes ruled out the rest.
        bounds: (Q, k) float32, where int8, int4 or sign rows have no wider copy, or it was not to be used: each score
            is at most so far from that of the row before it was narrowed. Scores are cosines: 2 says nothing.
    """

    scores: torch.Tensor
    indices: torch.Tensor
    queries: Sequence[EncodedQuery]
    corpus: Corpus
    method: str = "trackstar"
    mixing: float | None = None
    largest: bool = True
    opponents: "Result | None" = None
    blocks: tuple[str, ...] = ()
    by_block: torch.Tensor | None = None
    by_token: Sequence[Sequence[torch.Tensor]] | None = None
    rescored: torch.Tensor | None = None
    bounds: torch.Tensor | None = None

    def to_jsonl(
        self, path: str | os.PathLike[str], *, query_set: str = "queries", opponents: "Result | None" = None
    ) -> None:
        """Write one line per query in the format of the paper's viewer.

        Fields: example_id, query_set, inputs_plaintext, targets_plaintext, proponents, proponent_ids,
        proponent_scores; and the same three for opponents where they are given, or are what this result holds.

        Args:
            path: the file; replaced as a whole, or, where anything goes wrong, left as it is.
            query_set: name of the set of queries.
            opponents: the same queries' result with ``largest=False``; None for those that this result has.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".new")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                for i, query in enumerate(self.queries):
                    line: dict[str, object] = {
                        "example_id": query.id,
                        "query_set": query_set,
                        "inputs_plaintext": query.prompt,
                        "targets_plaintext": query.target,
                    }
                    for result in (self, opponents or self.opponents):
                        if result is not None:
                            line |= result._passages(i)
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _passages(self, query: int) -> dict[str, object]:
        name = "proponent" if self.largest else "opponent"
        indices = self.indices[query].tolist()
        return {
            f"{name}s": [self.corpus.text(i) for i in indices],
            f"{name}_ids": [self.corpus.id(i) for i in indices],
            f"{name}_scores": self.scores[query].tolist(),
        }


def joined(results: Iterable[Result]) -> Result:
    """The first result, with the second one, if there is one, as its opponents."""
    first, *others = results
    return dataclasses.replace(first, opponents=others[0]) if others else first
