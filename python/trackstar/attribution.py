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
from trackstar.scan import MEMORY, Found, Scan, plan_scan
from trackstar.selection import Where, select
from trackstar.store import Store
from trackstar_kernels import encode_rows

WHITENED_TOGETHER = 64
"""Queries that are whitened at a time: what that takes beside them is not to grow with their number."""


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
        opponents: the same queries' lowest scores, where they were asked for too.
    """

    scores: torch.Tensor
    indices: torch.Tensor
    mixing: float
    largest: bool
    queries: Sequence[EncodedQuery]
    store: Store
    opponents: "Result | None" = None

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
    where: Where = None,
    memory: int = MEMORY,
    device: str | torch.device = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Scan the store for the k best examples of each query, given the queries' rows.

    Args:
        store: a complete store.
        rows: (Q, L, d) float32 from :func:`query_rows`.
        k: examples per query, from 1 to as many as ``where`` leaves.
        mixing: λ in [0, 1), or "auto" for the paper's rule.
        largest: False for the lowest scores.
        where: which of the store's rows to look at, see :func:`attribute`.
        memory: bytes that the scan takes at most, see :func:`attribute`.
        device: where the store is scored, see :func:`attribute`.

    Returns:
        scores (Q, k) float32, indices (Q, k) int64, and λ.

    Raises:
        ValueError: an argument is out of range.
        StoreError: the store is incomplete or damaged.
    """
    scan = _plan(store, len(rows), k, mixing, (largest,), where, memory, device)
    (found,), used = _answer(scan, rows, mixing)
    return *found, used


def attribute(
    store: Store,
    model: nn.Module,
    queries: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    k: int = 10,
    mixing: str | float = "auto",
    largest: bool = True,
    opponents: bool = False,
    where: Where = None,
    output: str = "loss",
    memory: int = MEMORY,
    device: str | torch.device = "cpu",
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
        opponents: find the lowest scores in the same scan, as ``result.opponents``.
        where: look at these rows alone: a range, indices, a boolean mask over all rows, ids, or a function of an
            example (its ``index``, ``id``, ``text`` and ``metadata``) that says whether to keep it. Nothing is
            rewritten, and shards without such a row are not read. None looks at all.
        output: what a query's row is the gradient of: "loss" (the target's negative log-likelihood), "margin" or
            "logit".
        memory: bytes that the scan takes at most beyond the queries' rows (4·Q·L·d bytes), mapped pages included,
            however large the store. With less, pieces of the store are smaller, and many queries are taken in
            batches, each of which is a scan; the answer is the same.
        device: where the store is scored: "cpu", or a CUDA device, to which it is streamed through pinned memory
            and need not fit.

    Raises:
        TypeError: ``where`` is nothing of that kind.
        ValueError: an argument is not usable.
        StoreError: the store is incomplete, damaged, or of another model or tokenizer.
        FloatingPointError: a query's gradient is NaN or Inf.

    Source: TrackStar, arXiv 2410.17413, sections 3 and 4.
    """
    encoded = encode_queries(queries, tokenizer)
    directions = (True, False) if opponents else (largest,)
    scan = _plan(store, len(encoded), k, mixing, directions, where, memory, device)
    rows = query_rows(store, model, encoded, tokenizer=tokenizer, output=output)
    found, used = _answer(scan, rows, mixing)
    last = Result(*found[-1], used, directions[-1], encoded, store)
    return Result(*found[0], used, True, encoded, store, opponents=last) if opponents else last


def _plan(
    store: Store,
    queries: int,
    k: int,
    mixing: str | float,
    directions: Sequence[bool],
    where: Where,
    memory: int,
    device: str | torch.device,
) -> Scan:
    """The scan that is asked for, if it can be run."""
    store.require_complete()
    number = isinstance(mixing, int | float) and not isinstance(mixing, bool)
    if mixing != "auto" and not (number and 0 <= mixing < 1):  # type: ignore[operator]
        raise ValueError(f'mixing must be "auto" or a number with 0 ≤ mixing < 1, got {mixing!r}')
    chosen = select(store, where)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(chosen):
        limit = "the store's examples" if len(chosen) == len(store) else "the examples that where leaves"
        raise ValueError(f"k must be an int from 1 to {len(chosen)} ({limit}), got {k!r}")
    device = torch.device(device)
    if device.type != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device must be cpu where there is no CUDA device, got {device}")
    return plan_scan(
        store, chosen, queries, k, mixed=mixing != 0, directions=directions, memory=memory, device=device
    )


def _answer(scan: Scan, rows: torch.Tensor, mixing: str | float) -> tuple[list[Found], float]:
    """What the scan finds in each direction for the queries' rows, and λ."""
    curvature = scan.store.curvature
    used = choose_mixing(rows, curvature.eigenvalues) if mixing == "auto" else float(mixing)
    whitened = torch.empty_like(rows)
    for part, out in zip(rows.split(WHITENED_TOGETHER), whitened.split(WHITENED_TOGETHER), strict=True):
        out.copy_(encode_rows(part, curvature.whitener, "float32")[0])
    return scan.run(whitened, used), used
