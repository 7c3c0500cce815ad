"""Asking for influences: which training examples, added to the training set, would lower an answer's loss the most."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from trackstar.ekfac.capture import TokenCapture
from trackstar.ekfac.factors import Factors
from trackstar.ekfac.inverse import DampedInverse
from trackstar.ekfac.plan import plan_influence
from trackstar.ekfac.prefilter import candidates_of
from trackstar.ekfac.scoring import scores_of, terms_of, thin_queries, whole_query
from trackstar.gradients.examples import (
    Encoded,
    EncodedQuery,
    check_queries,
    check_vocabulary,
    encode_examples,
    encode_queries,
)
from trackstar.gradients.losses import output_function
from trackstar.gradients.passes import WINDOW, check_model, position_limit, vocabulary_size
from trackstar.progress import console, track
from trackstar.scoring.result import Examples, Result
from trackstar.storage import fingerprint
from trackstar_kernels.scoring import merge_topk

CANDIDATES = 10_000
"""Examples of a larger corpus that are scored for each query, as in the paper."""

RESCORED = 100
"""Examples that are scored anew at full rank for each query, as in the paper."""

MEMORY = 1 << 30
"""Bytes that the queries' thin matrices take at most, unless one query's take more."""


def influence(
    factors: Factors,
    model: nn.Module,
    examples: Iterable[Mapping[str, Any]],
    queries: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    k: int = 10,
    rank: int = 32,
    damping: float = 0.1,
    candidates: int | None = CANDIDATES,
    rescored: int = RESCORED,
    largest: bool = True,
    output: str = "loss",
    memory: int = MEMORY,
) -> Result:
    """The k training examples of the most influence on the model's giving each query's target after its prompt.

        I(m, q) = ∇f_qᵀ (G + λI)⁻¹ ∇L_m,  summed over the factors' modules

    where f_q is the negative log-likelihood of the query's target (or another output function), L_m that of training
    example m, and λ = damping · mean Λ in each module. To first order f_q falls in proportion to it when m is added
    to the training set: the largest are proponents.

    First every candidate is scored for many queries at a time, their preconditioned gradients reduced to products of
    thin matrices. Then the best of each query are scored anew at full rank, and what these scores are sums of is
    kept: each module's and each token's term. Says first what it will need (memory, time), then shows progress.

    Args:
        factors: from :func:`fit_factors` or :func:`open_factors`.
        model: the model that the factors are of.
        examples: the training examples, {"text": …} or {"input_ids": …, "labels": … (optional)}, each with an optional
            "id"; they need not be those that the factors were fitted on.
        queries: as :func:`trackstar.gradients.examples.encode_queries` takes them.
        tokenizer: the model's, for texts.
        k: examples per query.
        rank: of the thin matrices, in each module.
        damping: λ relative to the mean eigenvalue of a module.
        candidates: where there are more examples, only this many of the best by TF-IDF are scored for each query,
            which needs bm25s; None scores them all.
        rescored: examples per query that are scored anew at full rank; k, where that is more.
        largest: False for the opponents, the k lowest scores.
        output: what a query's gradient is of: "loss", "margin" or "logit".
        memory: bytes that the queries' thin matrices take at most; what does not fit takes another pass.

    Raises:
        ValueError: an argument is not usable.
        StoreError: the factors are damaged, or of another model or tokenizer.
        ImportError: bm25s is needed and missing.
        FloatingPointError: a gradient is NaN or Inf.
        RuntimeError: a module does not run exactly once in a pass.

    Source: Grosse et al., arXiv 2308.03296, sections 2.3 and 3.
    """
    corpus = encode_examples(examples, tokenizer, position_limit(model))
    asked = encode_queries(queries, tokenizer)
    output_function(output)
    _require_count("candidates", len(corpus) if candidates is None else candidates)
    scored = len(corpus) if candidates is None else min(candidates, len(corpus))
    _require_count("k", k, scored)
    for name, count in (("rank", rank), ("rescored", rescored), ("memory", memory)):
        _require_count(name, count)
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < math.inf:
        raise ValueError(f"damping must be a number above 0, got {damping!r}")
    check_vocabulary(corpus, vocabulary_size(model), "examples")
    check_queries(asked, vocabulary_size(model))
    check_model(model)
    fingerprint.require_same(model, tokenizer, factors)
    chosen = None if scored == len(corpus) else candidates_of(asked, corpus, scored)
    capture = TokenCapture(model, list(factors.shapes), biases=factors.biases)
    inverse = DampedInverse(factors, damping, next(model.parameters()).device)
    job = _Job(capture, inverse, corpus, asked, chosen, output, largest)
    rescored = min(max(rescored, k), scored)
    passes = job.passes(rank, memory)
    plan = plan_influence(
        capture, corpus, [(len(group), need) for group, need in passes], rank, len(asked) * rescored
    )
    console().print(str(plan), soft_wrap=True)
    for reason in capture.lean.skipped:
        console().print(f"slower than it could be: {reason}", soft_wrap=True)
    return job.answer(job.shortlist(passes, rank, rescored), k)


@dataclass(frozen=True)
class _Job:
    """What one call of :func:`influence` works with.

    Attributes:
        capture: what sees the model's gradients.
        inverse: the damped inverse of its curvature.
        corpus: the training examples.
        queries: what was asked.
        chosen: the positions, ascending, of each query's candidates; None where every example is one.
        output: name of what a query's gradient is of.
        largest: whether larger scores are better.
    """

    capture: TokenCapture
    inverse: DampedInverse
    corpus: Sequence[Encoded]
    queries: Sequence[EncodedQuery]
    chosen: Sequence[np.ndarray] | None
    output: str
    largest: bool

    def passes(self, rank: int, memory: int) -> list[tuple[range, np.ndarray]]:
        """Queries that fit into ``memory`` together, and the positions of the examples that any of them is to see."""
        numbers = sum(min(rank, *shape) * sum(shape) for shape in self.capture.shapes.values())
        together = max(1, memory // (4 * numbers))
        found = []
        for start in range(0, len(self.queries), together):
            group = range(start, min(start + together, len(self.queries)))
            if self.chosen is None:
                needed = np.arange(len(self.corpus))
            else:
                needed = np.unique(np.concatenate([self.chosen[q] for q in group]))
            found.append((group, needed))
        return found

    def shortlist(self, passes: list[tuple[range, np.ndarray]], rank: int, count: int) -> torch.Tensor:
        """Positions (Q, count) int64 of each query's best candidates by the thin matrices."""
        best = []
        with track("scoring", sum(len(needed) for _, needed in passes)) as advance:
            for group, needed in passes:
                thin = thin_queries(
                    self.capture, [self.queries[q] for q in group], self.inverse, rank, self.output
                )
                parts: list[tuple[torch.Tensor, torch.Tensor]] = []
                for start in range(0, len(needed), WINDOW):
                    positions = needed[start : start + WINDOW]
                    scores = scores_of(self.capture, [self.corpus[i] for i in positions], thin, advance)
                    if self.chosen is not None:
                        mine = np.stack([np.isin(positions, self.chosen[q]) for q in group])
                        scores[torch.from_numpy(~mine)] = -torch.inf if self.largest else torch.inf
                    indices = torch.from_numpy(positions).expand(len(group), -1)
                    parts = [merge_topk([*parts, (scores, indices)], count, self.largest)]
                best.append(parts[0][1])
        return torch.cat(best)

    def answer(self, shortlist: torch.Tensor, k: int) -> Result:
        """The k best of each query's short list (Q, n), by their scores at full rank."""
        scores, indices, by_module, by_token = [], [], [], []
        with track("scoring anew", shortlist.numel()) as advance:
            for query, positions in zip(self.queries, shortlist, strict=True):
                whole = whole_query(self.capture, query, self.inverse, self.output)
                terms = terms_of(self.capture, [self.corpus[i] for i in positions.tolist()], whole, advance)
                best, found = merge_topk([(terms.scores[None], positions[None])], k, self.largest)
                places = [positions.tolist().index(i) for i in found[0].tolist()]
                scores.append(best[0].float())
                indices.append(found[0])
                by_module.append(terms.by_module[places].float())
                by_token.append([terms.by_token[place] for place in places])
        return Result(
            torch.stack(scores),
            torch.stack(indices),
            self.queries,
            Examples(self.corpus),
            method="ekfac",
            largest=self.largest,
            blocks=tuple(self.capture.shapes),
            by_block=torch.stack(by_module),
            by_token=by_token,
        )


def _require_count(name: str, value: object, limit: int | None = None) -> None:
    wanted = "of at least 1" if limit is None else f"from 1 to {limit} (the examples scored)"
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < 1
        or (limit is not None and value > limit)
    ):
        raise ValueError(f"{name} must be an int {wanted}, got {value!r}")
