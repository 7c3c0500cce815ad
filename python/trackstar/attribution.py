"""Asking a store which training examples made a model say this."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trackstar import fingerprint
from trackstar.collector import GradientCollector
from trackstar.curvature import choose_mixing
from trackstar.examples import EncodedQuery, check_queries, encode_queries, encode_task
from trackstar.lean import LeanPass
from trackstar.losses import output_function
from trackstar.passes import check_model, vocabulary_size
from trackstar.progress import console
from trackstar.queries import rows_of_queries
from trackstar.result import Result
from trackstar.scan import MEMORY, Found, Scan, plan_scan
from trackstar.selection import Where, select
from trackstar.store import Store
from trackstar.terms import with_terms
from trackstar_kernels import encode_rows

ONE_QUERY = (
    "R_eval of one query has rank 1 in each block, so that it moves scores and hardly their order: ask several queries "
    "together, give a task set, or leave R_eval out with mixing 0"
)

WHITENED_TOGETHER = 64
"""Queries that are whitened at a time: what that takes beside them is not to grow with their number."""


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
    output_function(output)
    check_queries(queries, vocabulary_size(model))
    check_model(model)
    fingerprint.require_same(model, tokenizer, store)
    collector = GradientCollector(model, store.spec, store.correction)
    lean = LeanPass(model, collector.modules.values())
    return rows_of_queries(lean, queries, collector, output)


def score_rows(
    store: Store,
    rows: torch.Tensor,
    *,
    k: int,
    mixing: str | float = "auto",
    task: torch.Tensor | None = None,
    largest: bool = True,
    where: Where = None,
    memory: int = MEMORY,
    device: str | torch.device = "cpu",
    rescore: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Scan the store for the k best examples of each query, given the queries' rows.

    Args:
        store: a complete store.
        rows: (Q, L, d) float32 from :func:`query_rows`.
        k: examples per query, from 1 to as many as ``where`` leaves.
        mixing: λ in [0, 1), or "auto" for the paper's rule.
        task: (T, L, d) float32, rows of other queries that make R_eval; None for ``rows``.
        largest: False for the lowest scores.
        where: which of the store's rows to look at, see :func:`attribute`.
        memory: bytes that the scan takes at most, see :func:`attribute`.
        device: where the store is scored, see :func:`attribute`.
        rescore: whether to answer from a wider copy of the rows, see :func:`attribute`.

    Returns:
        scores (Q, k) float32, indices (Q, k) int64, and λ.

    Raises:
        ValueError: an argument is out of range.
        StoreError: the store is incomplete or damaged.
    """
    count = 0 if task is None else len(task)
    scan = _plan(store, len(rows), count, k, mixing, (largest,), where, memory, device, rescore)
    (found,), used = _answer(scan, rows, task, mixing)
    return found.scores, found.indices, used


def attribute(
    store: Store,
    model: nn.Module,
    queries: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    k: int = 10,
    mixing: str | float = "auto",
    task: Iterable[Mapping[str, Any]] | None = None,
    largest: bool = True,
    opponents: bool = False,
    where: Where = None,
    output: str = "loss",
    by_block: bool = False,
    by_token: bool = False,
    memory: int = MEMORY,
    device: str | torch.device = "cpu",
    rescore: bool = True,
) -> Result:
    """The k training examples that most influenced the model's giving each query's target after its prompt.

    I(m, q) = Ḡ(m)·Ḡ(q), the cosine of whitened, corrected, projected gradients, with the mixed curvature
    R = λ R_eval + (1 − λ) R_train and R_eval from these very queries, or from those of ``task``: one scan of the
    store, exact for any λ. An example or query without any gradient scores 0.

    Args:
        store: a complete store, from :func:`build_store` or :func:`open_store`.
        model: the model that the store was built with.
        queries: {"prompt": …, "target": …} or {"input_ids": …, "labels": …}, each with an optional "id"; or with
            several targets, or one rather than another, see :func:`trackstar.examples.encode_queries`.
        tokenizer: the model's, for queries given as text.
        k: examples per query.
        mixing: λ in [0, 1), or "auto" for the paper's rule.
        task: other queries, at least two, that make R_eval in place of those that are asked; with λ = 0 nothing does.
        largest: False for the opponents, the k lowest scores.
        opponents: find the lowest scores in the same scan, as ``result.opponents``.
        where: look at these rows alone: a range, indices, a boolean mask over all rows, ids, or a function of an
            example (its ``index``, ``id``, ``text`` and ``metadata``) that says whether to keep it. Nothing is
            rewritten, and shards without such a row are not read. None looks at all.
        output: what a query's row is the gradient of: "loss" (the target's negative log-likelihood), "margin" or
            "logit".
        by_block: fill in ``result.by_block``: each layer block's term of every score.
        by_token: fill in ``result.by_token``: each training token's term of every score. The model runs over the
            examples found.
        memory: bytes that the scan takes at most beyond the queries' rows (4·Q·L·d bytes), mapped pages included,
            however large the store. With less, pieces of the store are smaller, and many queries are taken in
            batches, each of which is a scan; the answer is the same.
        device: where the store is scored: "cpu", or a CUDA device, to which it is streamed through pinned memory
            and need not fit.
        rescore: where int8, int4 or sign rows have a wider copy beside them, answer as that does, exactly, and count
            in ``result.rescored`` the rows that it took. False leaves the copy alone; then, and where there is none,
            ``result.bounds`` says how far narrow rows' scores may be off.

    Raises:
        TypeError: ``where`` is nothing of that kind.
        ValueError: an argument is not usable.
        StoreError: the store is incomplete, damaged, or of another model or tokenizer.
        FloatingPointError: a query's gradient is NaN or Inf.

    Source: TrackStar, arXiv 2410.17413, sections 3 and 4.
    """
    encoded = encode_queries(queries, tokenizer)
    others = [] if task is None else encode_task(task, tokenizer)
    directions = (True, False) if opponents else (largest,)
    scan = _plan(store, len(encoded), len(others), k, mixing, directions, where, memory, device, rescore)
    rows = query_rows(store, model, [*encoded, *others], tokenizer=tokenizer, output=output)
    asked = rows[: len(encoded)]
    shaping = rows[len(encoded) :] if others else None
    found, used = _answer(scan, asked, shaping, mixing)
    results = [
        Result(
            best.scores,
            best.indices,
            encoded,
            store,
            mixing=used,
            largest=largest,
            rescored=best.rescored,
            bounds=best.bounds,
        )
        for best, largest in zip(found, directions, strict=True)
    ]
    if by_block or by_token:
        results = [
            with_terms(r, model, asked, shaping, by_block=by_block, by_token=by_token) for r in results
        ]
    return dataclasses.replace(results[0], opponents=results[1]) if opponents else results[0]


def _plan(
    store: Store,
    queries: int,
    others: int,
    k: int,
    mixing: str | float,
    directions: Sequence[bool],
    where: Where,
    memory: int,
    device: str | torch.device,
    rescore: bool,
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
        store,
        chosen,
        queries,
        k,
        task=others,
        mixed=mixing != 0,
        directions=directions,
        memory=memory,
        device=device,
        rescore=rescore,
    )


def _answer(
    scan: Scan, rows: torch.Tensor, task: torch.Tensor | None, mixing: str | float
) -> tuple[list[Found], float]:
    """What the scan finds in each direction for the queries' rows, and λ; R_eval is the task's, if there is one."""
    curvature, shaping = scan.store.curvature, rows if task is None else task
    used = choose_mixing(shaping, curvature.eigenvalues) if mixing == "auto" else float(mixing)
    if used > 0 and len(shaping) == 1:
        console().print(ONE_QUERY, soft_wrap=True)
    given = rows if task is None else torch.cat([rows, task])
    whitened = torch.empty_like(given)
    for part, out in zip(given.split(WHITENED_TOGETHER), whitened.split(WHITENED_TOGETHER), strict=True):
        out.copy_(encode_rows(part, curvature.whitener, "float32")[0])
    return scan.run(whitened, used, None if task is None else range(len(rows), len(given))), used
