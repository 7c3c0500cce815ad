"""Asking a store which training examples made a model say this, by any method."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trackstar.curvature import choose_mixing
from trackstar.gradients.collector import GradientCollector
from trackstar.gradients.examples import EncodedQuery, check_queries, encode_queries, encode_task
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.losses import output_function
from trackstar.gradients.passes import check_model, vocabulary_size
from trackstar.gradients.queries import rows_of_queries
from trackstar.progress import console
from trackstar.scoring.baselines import Encoder, bm25_scores, chosen_texts, read_queries
from trackstar.scoring.methods import GRADIENTS, READERS, Gradients, require_method, require_rows
from trackstar.scoring.probability import stored_probabilities
from trackstar.scoring.products import Weigh, by_unwhitened_norm, by_weight, unwhitening_queries
from trackstar.scoring.result import Result, joined
from trackstar.scoring.scan import MEMORY, Found, Scan, plan_scan
from trackstar.scoring.selection import Where, select, select_at_least
from trackstar.scoring.terms import with_terms
from trackstar.storage import fingerprint
from trackstar.storage.store import Store
from trackstar.storage.stored_examples import stored_parts
from trackstar_kernels import encode_rows
from trackstar_kernels.scoring import merge_topk

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
    output: str | None = None,
) -> torch.Tensor:
    """Rows (Q, L, d) float32 of the queries, projected and corrected as the store's are, not whitened.

    They are gradients of ``output``, or, with None, of what the store's rows are gradients of.

    Raises:
        StoreError: the store was built with another model or tokenizer.
        ValueError: a query does not fit the model, or ``output`` is unknown.
        FloatingPointError: a query's gradient is NaN or Inf.
    """
    output = store.output if output is None else output
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
    """Scan the store for the k best examples of each query by TrackStar, given the queries' rows.

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
    scan = _plan(
        store, GRADIENTS["trackstar"], len(rows), count, k, mixing, (largest,), where, memory, device, rescore
    )
    (found,), used = _answer(scan, rows, task, mixing)
    return found.scores, found.indices, used


def attribute(
    store: Store,
    model: nn.Module | None,
    queries: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    method: str = "trackstar",
    k: int = 10,
    mixing: str | float = "auto",
    task: Iterable[Mapping[str, Any]] | None = None,
    largest: bool = True,
    opponents: bool = False,
    where: Where = None,
    output: str | None = None,
    by_block: bool = False,
    by_token: bool = False,
    memory: int = MEMORY,
    device: str | torch.device = "cpu",
    rescore: bool = True,
    factors: str | os.PathLike[str] | None = None,
    encoder: str | os.PathLike[str] | None = None,
) -> Result:
    """The k training examples that most influenced the model's giving each query's target after its prompt.

    By TrackStar, I(m, q) = Ḡ(m)·Ḡ(q), the cosine of whitened, corrected, projected gradients, with the mixed
    curvature R = λ R_eval + (1 − λ) R_train and R_eval from these very queries, or from those of ``task``: one scan
    of the store, exact for any λ. An example or query without any gradient scores 0. docs/methods.md has the other
    methods' formulas.

    Args:
        store: a complete store, from :func:`build_store` or :func:`open_store`.
        model: the model that the store was built with; None where the method is "bm25" or "dense".
        queries: {"prompt": …, "target": …} or {"input_ids": …, "labels": …}, each with an optional "id"; or with
            several targets, or one rather than another, see :func:`trackstar.gradients.examples.encode_queries`.
        tokenizer: the model's, for queries given as text.
        method: a name in :data:`trackstar.scoring.methods.METHODS`. Some need other rows than a store may hold
            (:func:`companion_store` builds a store of them), and "trak" a pass over the store's examples, once.
        k: examples per query.
        mixing: λ in [0, 1), or "auto" for the paper's rule; "trackstar" alone mixes.
        task: other queries, at least two, that make R_eval in place of those that are asked; with λ = 0 nothing does.
        largest: False for the opponents, the k lowest scores.
        opponents: find the lowest scores in the same scan, as ``result.opponents``.
        where: look at these rows alone: a range, indices, a boolean mask over all rows, ids, or a function of an
            example (its ``index``, ``id``, ``text`` and ``metadata``) that says whether to keep it. Nothing is
            rewritten, and shards without such a row are not read. None looks at all.
        output: what a query's row is the gradient of: "loss" (the target's negative log-likelihood), "margin" or
            "logit"; None for what the store's rows are gradients of.
        by_block: fill in ``result.by_block``: each layer block's term of every score, of cosines of whitened rows.
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
        factors: folder of EK-FAC's factors, for "ekfac".
        encoder: folder of a sentence-transformers model, for "dense".

    Raises:
        TypeError: ``where`` is nothing of that kind.
        ValueError: an argument is not usable, or the store does not hold the rows that the method scores.
        StoreError: the store is incomplete, damaged, or of another model or tokenizer.
        FloatingPointError: a query's gradient is NaN or Inf.
        ImportError: "bm25" without bm25s.

    Source: TrackStar, arXiv 2410.17413, sections 3 and 4.
    """
    require_method(method)
    for name, value, user in (("factors", factors, "ekfac"), ("encoder", encoder, "dense")):
        if (value is not None) != (method == user):
            wanted = f"given with method {user}" if method == user else f"None with method {method}"
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
    if mixing != "auto" and method != "trackstar":
        raise ValueError(f'mixing must be "auto" with method {method}, which mixes nothing, got {mixing!r}')
    if (by_block or by_token) and method not in ("trackstar", "r-norm", "v-r-norm", "ekfac"):
        raise ValueError(f"by_block and by_token must be False with method {method}, which has no such terms")
    if task is not None and method != "trackstar":
        raise ValueError(f"task must be None with method {method}, which mixes nothing")
    given = list(queries)
    encoded = (read_queries if method in READERS else encode_queries)(given, tokenizer)
    directions = (True, False) if opponents else (largest,)
    if method in READERS:
        return _by_texts(store, encoded, method, k, directions, where, encoder)
    if model is None:
        raise ValueError(f"model must be given with method {method}, got None")
    if factors is not None:
        return _influence(store, model, given, tokenizer, k, directions, where, output, factors)
    kind = GRADIENTS[method]
    require_rows(method, store)
    others = [] if task is None else encode_task(task, tokenizer)
    scan = _plan(
        store, kind, len(encoded), len(others), k, mixing, directions, where, memory, device, rescore
    )
    rows = query_rows(store, model, [*encoded, *others], tokenizer=tokenizer, output=output)
    asked = rows[: len(encoded)]
    shaping = rows[len(encoded) :] if others else None
    if kind.whitened and kind.unit_norm:
        found, used = _answer(scan, asked, shaping, mixing if kind.mixed else 0.0)
    else:
        if kind.whitened:
            compared = whiten(store, asked)
        else:
            compared = unwhitening_queries(asked, store.curvature, unit_norm=kind.unit_norm)
        found, used = scan.products(compared, _weigh(kind, store, model, tokenizer, scan.device)), 0.0
    results = [
        Result(
            best.scores,
            best.indices,
            encoded,
            store,
            method=method,
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
    return joined(r if kind.mixed else dataclasses.replace(r, mixing=None) for r in results)


def _by_texts(
    store: Store,
    queries: Sequence[EncodedQuery],
    method: str,
    k: int,
    directions: Sequence[bool],
    where: Where,
    encoder: str | os.PathLike[str] | None,
) -> Result:
    """What a method finds that reads the store's texts."""
    chosen = select_at_least(store, where, k)
    # How rare a word is, the whole corpus says.
    texts, positions = chosen_texts(store, select(store) if method == "bm25" else chosen)
    asked = [query.text for query in queries]
    scores = bm25_scores(asked, texts) if encoder is None else Encoder(encoder).scores(asked, texts)
    kept = torch.isin(positions, chosen.rows)
    parts = [(scores[:, kept], positions[kept].expand(len(asked), -1))]
    return joined(
        Result(*merge_topk(parts, k, largest), queries, store, method=method, largest=largest)
        for largest in directions
    )


def _influence(
    store: Store,
    model: nn.Module,
    queries: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    k: int,
    directions: Sequence[bool],
    where: Where,
    output: str | None,
    factors: str | os.PathLike[str],
) -> Result:
    """EK-FAC's influences of the store's examples: a run for each direction."""
    from trackstar.ekfac import influence, open_factors

    positions = select_at_least(store, where, k).rows
    examples = [example for part in stored_parts(store) for example in part]
    results = []
    for largest in directions:
        result = influence(
            open_factors(factors),
            model,
            [examples[i] for i in positions.tolist()],
            queries,
            tokenizer=tokenizer,
            k=k,
            largest=largest,
            output=output or "loss",
        )
        results.append(dataclasses.replace(result, indices=positions[result.indices], corpus=store))
    return joined(results)


def _plan(
    store: Store,
    method: Gradients,
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
    number = isinstance(mixing, int | float) and not isinstance(mixing, bool)
    if mixing != "auto" and not (number and 0 <= mixing < 1):  # type: ignore[operator]
        raise ValueError(f'mixing must be "auto" or a number with 0 ≤ mixing < 1, got {mixing!r}')
    chosen = select_at_least(store, where, k)
    device = torch.device(device)
    if device.type != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device must be cpu where there is no CUDA device, got {device}")
    return plan_scan(
        store,
        chosen,
        queries,
        k,
        task=others,
        mixed=method.mixed and mixing != 0,
        unwhitened_norms=method.unit_norm and not method.whitened,
        directions=directions,
        memory=memory,
        device=device,
        rescore=rescore,
    )


def whiten(store: Store, rows: torch.Tensor) -> torch.Tensor:
    """Rows (Q, L, d) float32 of queries as the store keeps its own, whitened by R_train."""
    whitened = torch.empty_like(rows)
    for part, out in zip(rows.split(WHITENED_TOGETHER), whitened.split(WHITENED_TOGETHER), strict=True):
        out.copy_(encode_rows(part, store.curvature.whitener, "float32")[0])
    return whitened


def _answer(
    scan: Scan, rows: torch.Tensor, task: torch.Tensor | None, mixing: str | float
) -> tuple[list[Found], float]:
    """What the scan finds in each direction for the queries' rows, and λ; R_eval is the task's, if there is one."""
    curvature, shaping = scan.store.curvature, rows if task is None else task
    used = choose_mixing(shaping, curvature.eigenvalues) if mixing == "auto" else float(mixing)
    asked = whiten(scan.store, rows if task is None else torch.cat([rows, task]))
    found = scan.run(asked, used, None if task is None else range(len(rows), len(asked)))
    if used > 0 and len(shaping) == 1:
        console().print(ONE_QUERY, soft_wrap=True)
    return found, used


def _weigh(
    kind: Gradients, store: Store, model: nn.Module, tokenizer: Any, device: torch.device
) -> Weigh | None:
    """What a method weighs a store's rows by, besides their products with the queries."""
    if kind.weighted:
        # R is a mean, ΦᵀΦ/N, so that (ΦᵀΦ)⁻¹ is R⁻¹/N.
        return by_weight((1 - stored_probabilities(store, model, tokenizer)) / len(store), device)
    return by_unwhitened_norm(store.curvature, device) if kind.unit_norm else None
