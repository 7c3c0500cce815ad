"""TracIn: the steps of a training run, approximated at some of its checkpoints."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from trackstar.gradients.examples import encode_queries
from trackstar.progress import track
from trackstar.scoring.attribution import query_rows
from trackstar.scoring.methods import require_rows
from trackstar.scoring.products import unwhitening_queries
from trackstar.scoring.result import Result, joined
from trackstar.scoring.scan import LEAST_ROWS, MEMORY
from trackstar.scoring.selection import Where, select_at_least
from trackstar.storage.store import Store
from trackstar_kernels.scoring import merge_topk, score_topk


def tracin(
    checkpoints: Iterable[tuple[Store, nn.Module, float]],
    queries: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    k: int = 10,
    largest: bool = True,
    opponents: bool = False,
    where: Where = None,
    output: str | None = None,
    memory: int = MEMORY,
) -> Result:
    """The k training examples whose steps lowered each query's loss the most, by the first order:

        I(m, q) = Σ_c η_c · x_c(q)·x_c(m)

    with x_c the projected gradients of checkpoint c, uncorrected, and η_c its learning rate.

    Args:
        checkpoints: (store, model, η) of each, the stores of the same examples in the same order, with rows that are
            not corrected; asked for one after another, so that a generator has one model in memory at a time.
        queries: as for :func:`attribute`, which has the other options too.
        tokenizer: the models'.
        k: examples per query.
        largest: False for the opponents, the k lowest scores.
        opponents: find the lowest scores in the same scan, as ``result.opponents``.
        where: look at these rows alone.
        output: what a query's row is the gradient of; None for what the stores' rows are gradients of.
        memory: bytes that pieces of the stores take at most, unless 64 rows take more.

    Returns:
        A result whose corpus is the first store.

    Raises:
        ValueError: there are no checkpoints, or one does not fit, or another argument is not usable.
        StoreError: a store is incomplete, damaged, or of another model or tokenizer, or of other examples.

    Source: Pruthi et al. 2020, arXiv 2002.08484, section 3.2 (TracInCP), with random projections (section 3.4).
    """
    encoded = encode_queries(queries, tokenizer)
    stores: list[Store] = []
    parts = []
    for store, model, rate in checkpoints:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise ValueError(f"the learning rate of {store.path} must be a number above 0, got {rate!r}")
        require_rows("tracin", store)
        chosen = select_at_least(store, where, k)
        if stores and (store.parts, store.deleted.tolist()) != (stores[0].parts, stores[0].deleted.tolist()):
            raise ValueError(
                f"checkpoints must be of the same examples; {store.path} holds others than {stores[0].path}"
            )
        rows = query_rows(store, model, encoded, tokenizer=tokenizer, output=output)
        parts.append(rate * unwhitening_queries(rows, store.curvature).flatten(1))
        stores.append(store)
    if not stores:
        raise ValueError("checkpoints must hold at least one (store, model, learning rate), got none")
    asked = torch.cat(parts, dim=1)
    together = max(LEAST_ROWS, memory // (8 * asked.shape[1]))
    directions = (True, False) if opponents else (largest,)
    best: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in directions]
    with track("scanning", len(chosen), passing=True) as advance:
        for first, end in chosen:
            for start in range(first, end, together):
                stop = min(start + together, end)
                rows = torch.cat([store.rows(start, stop).flatten(1) for store in stores], dim=1)
                for found, direction in zip(best, directions, strict=True):
                    scores = score_topk(asked, rows, min(k, stop - start), largest=direction, start=start)
                    found[:] = [merge_topk([*found, scores], k, direction)]
                advance(stop - start)
    return joined(
        Result(*found, encoded, stores[0], method="tracin", largest=direction)
        for (found,), direction in zip(best, directions, strict=True)
    )
