"""Asking a store which training examples made a model say this."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trackstar import fingerprint
from trackstar.collector import GradientCollector
from trackstar.curvature import choose_mixing
from trackstar.examples import EncodedQuery, check_vocabulary, encode_queries
from trackstar.lean import LeanPass
from trackstar.losses import output_function
from trackstar.passes import check_model, rows_of, vocabulary_size
from trackstar.store import Store, StoreError
from trackstar_kernels import encode_rows, mixed_topk
from trackstar_kernels.scoring import merge_topk


@dataclasses.dataclass(frozen=True)
class Result:
    """The most influential training examples of each query, best first.

    Attributes:
        scores: (Q, k) float32, the influence I(m, q), a cosine: from −1 to 1.
        indices: (Q, k) int64, positions in the store's corpus.
        mixing: λ, the share of the queries' own curvature in R.
        largest: True for proponents, False for opponents (the lowest scores, lowest first).
        queries: what was asked.
        store: the store that answered.
    """

    scores: torch.Tensor
    indices: torch.Tensor
    mixing: float
    largest: bool
    queries: Sequence[EncodedQuery]
    store: Store

    def to_jsonl(
        self, path: str | os.PathLike[str], *, query_set: str = "queries", opponents: "Result | None" = None
    ) -> None:
        """Write one line per query in the format of the paper's viewer.

        Fields: example_id, query_set, inputs_plaintext, targets_plaintext, proponents, proponent_ids,
        proponent_scores; and the same three for opponents where they are given, or are what this result holds.

        Args:
            path: the file; replaced as a whole.
            query_set: name of the set of queries.
            opponents: the same queries' result with ``largest=False``.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".new")
        with temporary.open("w", encoding="utf-8") as file:
            for i, query in enumerate(self.queries):
                line: dict[str, object] = {
                    "example_id": query.id,
                    "query_set": query_set,
                    "inputs_plaintext": query.prompt,
                    "targets_plaintext": query.target,
                }
                for result in (self, opponents):
                    if result is not None:
                        line |= result._passages(i)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        temporary.replace(path)

    def _passages(self, query: int) -> dict[str, object]:
        name = "proponent" if self.largest else "opponent"
        indices = self.indices[query].tolist()
        return {
            f"{name}s": [self.store.text(i) for i in indices],
            f"{name}_ids": [self.store.id(i) for i in indices],
            f"{name}_scores": self.scores[query].tolist(),
        }


def query_rows(
    store: Store,
    model: nn.Module,
    queries: Sequence[EncodedQuery],
    *,
    tokenizer: Any = None,
    output: str = "loss",
) -> torch.Tensor:
    """Rows (Q, L, d) float32 of the queries, projected and corrected as the store's are, not whitened.

    Raises:
        StoreError: the store was built with another model or tokenizer.
        ValueError: a query does not fit the model, or ``output`` is unknown.
        FloatingPointError: a query's gradient is NaN or Inf.
    """
    loss = output_function(output)
    check_vocabulary(queries, vocabulary_size(model), "queries")
    check_model(model)
    fingerprint.require_same(model, tokenizer, store)
    collector = GradientCollector(model, store.spec, store.correction)
    lean = LeanPass(model, collector.modules.values())
    return rows_of(lean, queries, collector, loss=loss)


def score_rows(
    store: Store,
    rows: torch.Tensor,
    *,
    k: int,
    mixing: str | float = "auto",
    largest: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Scan the store for the k best examples of each query, given the queries' rows.

    Shards are mapped one at a time, so memory does not grow with the store.

    Args:
        store: a complete store.
        rows: (Q, L, d) float32 from :func:`query_rows`.
        k: examples per query, 1 ≤ k ≤ len(store).
        mixing: λ in [0, 1), or "auto" for the paper's rule.
        largest: False for the lowest scores.

    Returns:
        scores (Q, k) float32, indices (Q, k) int64, and λ.

    Raises:
        ValueError: an argument is out of range.
        StoreError: the store is incomplete or damaged.
    """
    store.require_complete()
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(store):
        raise ValueError(f"k must be an int from 1 to {len(store)} (the store's examples), got {k!r}")
    if mixing == "auto":
        mixing = choose_mixing(rows, store.curvature.eigenvalues)
    elif isinstance(mixing, bool) or not isinstance(mixing, int | float) or not 0 <= mixing < 1:
        raise ValueError(f'mixing must be "auto" or a number with 0 ≤ mixing < 1, got {mixing!r}')
    whitened, _, _ = encode_rows(rows, store.curvature.whitener, "float32")
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    for shard in store.shards:
        live = shard.live
        if len(live) == 0:
            continue
        whole = len(live) == len(shard)
        scores, positions = mixed_topk(
            whitened,
            shard.codes if whole else shard.codes[live],
            shard.squared_norms if whole else shard.squared_norms[live],
            min(k, len(live)),
            float(mixing),
            scales=shard.scales if whole or shard.scales is None else shard.scales[live],
            largest=largest,
        )
        found = scores, live[positions] + shard.start
        best = merge_topk([found] if best is None else [best, found], k, largest=largest)
    if best is None:
        raise StoreError(f"the store at {store.path} holds no rows")
    return *best, float(mixing)


def attribute(
    store: Store,
    model: nn.Module,
    queries: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    k: int = 10,
    mixing: str | float = "auto",
    largest: bool = True,
    output: str = "loss",
) -> Result:
    """The k training examples that most influenced the model's giving each query's target after its prompt.

    I(m, q) = Ḡ(m)·Ḡ(q), the cosine of whitened, corrected, projected gradients, with the mixed curvature
    R = λ R_eval + (1 − λ) R_train and R_eval from these very queries: one scan of the store, exact for any λ.
    An example or query without any gradient scores 0.

    Args:
        store: a complete store, from :func:`build_store` or :func:`open_store`.
        model: the model that the store was built with.
        queries: {"prompt": …, "target": …} or {"input_ids": …, "labels": …}, each with an optional "id".
        tokenizer: the model's, for queries given as text.
        k: examples per query.
        mixing: λ in [0, 1), or "auto" for the paper's rule.
        largest: False for the opponents, the k lowest scores.
        output: what a query's row is the gradient of: "loss" (the target's negative log-likelihood), "margin" or
            "logit".

    Raises:
        ValueError: an argument is not usable.
        StoreError: the store is incomplete, damaged, or of another model or tokenizer.
        FloatingPointError: a query's gradient is NaN or Inf.

    Source: TrackStar, arXiv 2410.17413, sections 3 and 4.
    """
    encoded = encode_queries(queries, tokenizer)
    rows = query_rows(store, model, encoded, tokenizer=tokenizer, output=output)
    scores, indices, used = score_rows(store, rows, k=k, mixing=mixing, largest=largest)
    return Result(scores, indices, used, largest, encoded, store)
