"""What a store's scores are sums of: the terms of layer blocks, and of the tokens of training examples.

With y a whitened row, Y the queries', c = λ/((1 − λ)Q) and, block by block, W = (I + c YᵀY)⁻¹/(1 − λ), which is R⁻¹ in
whitened coordinates (README of trackstar_kernels/scoring), a score is a sum over blocks

    I(m, q) = Σ_b (W y_q)_b · (y_m)_b / √(N_q N_m)      N = Σ_b yᵀ W y

and as a row is linear in an example's gradient, Σ_t δ_t x_tᵀ in each module, the same score is a sum over tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn

from trackstar.gradients.examples import Encoded
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.losses import output_function
from trackstar.gradients.passes import BATCH_TOKENS, has_loss
from trackstar.gradients.sketching import Sketch
from trackstar.gradients.tap import GradientTap
from trackstar.gradients.weights import Use
from trackstar.progress import track
from trackstar.scoring.result import Result
from trackstar.scoring.selection import Selection, shards_of
from trackstar.storage.store import Store
from trackstar_kernels import encode_rows

ROW_BYTES = 1 << 28
"""Of the examples' rows that are in memory at a time."""


@dataclasses.dataclass(frozen=True)
class Terms:
    """Scores of some examples for each query, block by block.

    Attributes:
        by_block: (Q, k, L) float64.
        directions: W y_q (Q, L, d) float32.
        scales: 1/√(N_q N_m), (Q, k) float64; 0 where a row is zero.
    """

    by_block: torch.Tensor
    directions: torch.Tensor
    scales: torch.Tensor


def with_terms(
    result: Result,
    model: nn.Module,
    rows: torch.Tensor,
    task: torch.Tensor | None = None,
    *,
    by_block: bool,
    by_token: bool,
) -> Result:
    """The result of a scan, with what its scores are sums of.

    Args:
        result: of a store.
        model: the model that the store was built with.
        rows: those of the queries that were asked, (Q, L, d) float32, not whitened.
        task: rows of the queries that make R_eval, where these are others.
        by_block: fill in ``blocks`` and ``by_block``.
        by_token: fill in ``by_token``; runs the model over the examples found.

    Raises:
        ValueError: an example's row is not that of its tokens.
        StoreError: a shard is damaged.
    """
    store, mixing = result.corpus, result.mixing
    if not isinstance(store, Store) or mixing is None:
        raise TypeError("result must be of a scan of a store")
    whitener = store.curvature.whitener
    queries, _, _ = encode_rows(rows, whitener, "float32")
    others = None if task is None else encode_rows(task, whitener, "float32")[0]
    terms = block_terms(store, queries, mixing, result.indices, others)
    if by_block:
        names = store.spec.block_names(model)
        result = dataclasses.replace(result, blocks=names, by_block=terms.by_block.float())
    if by_token:
        result = dataclasses.replace(result, by_token=token_terms(store, model, terms, result.indices))
    return result


def block_terms(
    store: Store,
    queries: torch.Tensor,
    mixing: float,
    indices: torch.Tensor,
    task: torch.Tensor | None = None,
) -> Terms:
    """Each block's term of the scores of pairs; reads the rows of these examples alone. Float64 throughout.

    Args:
        store: the store.
        queries: whitened rows of those that were asked, (Q, L, d) float32.
        mixing: λ.
        indices: (Q, k) int64, examples of the store for each query.
        task: whitened rows of the queries that make R_eval, where these are others.

    Raises:
        StoreError: a shard is damaged.
    """
    Q, L, d = queries.shape
    found, places = indices.unique(return_inverse=True)
    terms = torch.zeros(*indices.shape, L, dtype=torch.float64)
    scales = torch.zeros(indices.shape, dtype=torch.float64)
    directions = torch.empty_like(queries)
    step = max(ROW_BYTES // (4 * L * d), 1)
    for start in range(0, len(found), step):
        rows, squared_norms = _read(store, found[start : start + step])
        query, rank = ((places >= start) & (places < start + step)).nonzero(as_tuple=True)
        row = places[query, rank] - start
        of_queries, of_rows = (torch.zeros(n, dtype=torch.float64) for n in (Q, len(rows)))
        for b in range(L):
            asked, y = queries[:, b].double(), rows[:, b].double()
            inverse = _MixedInverse(asked if task is None else task[:, b].double(), mixing)
            direction = inverse.times(asked)
            directions[:, b] = direction
            terms[query, rank, b] = (direction[query] * y[row]).sum(1)
            of_queries += (direction * asked).sum(1)
            of_rows += inverse.squared_norms(y, squared_norms[:, b].double())
        norms = of_queries[query] * of_rows[row]
        scales[query, rank] = torch.where(norms > 0, norms.rsqrt(), 0.0)
    return Terms(terms * scales[:, :, None], directions, scales)


class _MixedInverse:
    """W of one block: (I + c YᵀY)⁻¹/(1 − λ) = (I − c Yᵀ M Y)/(1 − λ) with M = (I + c Y Yᵀ)⁻¹.

    Args:
        queries: Y (Q, d) float64.
        mixing: λ.
    """

    def __init__(self, queries: torch.Tensor, mixing: float) -> None:
        self._rest = 1 - mixing
        self._c = mixing / (self._rest * len(queries))
        # More queries than dimensions have a smaller square root of YᵀY.
        self._y = torch.linalg.qr(queries, mode="r").R if len(queries) > queries.shape[1] else queries
        eye = torch.eye(len(self._y), dtype=torch.float64)
        self._middle = torch.linalg.inv(eye + self._c * self._y @ self._y.T)

    def times(self, v: torch.Tensor) -> torch.Tensor:
        """W v for each v, (n, d)."""
        return (v - self._c * (v @ self._y.T @ self._middle @ self._y)) / self._rest

    def squared_norms(self, v: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """vᵀ W v for each v, given ‖v‖², which for narrow rows is known better than v: (n,)."""
        products = v @ self._y.T
        return (plain - self._c * ((products @ self._middle) * products).sum(1)) / self._rest


def _read(store: Store, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, L, d) and squared norms (n, L), float32, of these examples, ascending."""
    chosen = Selection.of_rows(indices.numpy())
    rows, squared_norms = [], []
    for shard in shards_of(store, chosen):
        for start, stop in chosen.within(shard.start, shard.stop):
            rows.append(shard.floats(start, stop))
            squared_norms.append(shard.squared_norms[start - shard.start : stop - shard.start])
    return torch.cat(rows), torch.cat(squared_norms)


def token_terms(
    store: Store, model: nn.Module, terms: Terms, indices: torch.Tensor
) -> list[list[torch.Tensor]]:
    """What the gradient at each token of an example contributes to the example's score.

    The model runs forward and backward over each query's examples, with every token as an example of its own to what
    captures gradients.

    Args:
        store: the store.
        model: the model that it was built with.
        terms: from :func:`block_terms` for the same ``indices``.
        indices: (Q, k) int64.

    Returns:
        For each query and example (T,) float32. They sum to the score, of rows before narrowing.

    Raises:
        ValueError: an example's row is not that of its tokens: it was built with labels of its own.
    """
    tokens = _TokenPass(store, model)
    whitener = store.curvature.whitener
    found = []
    with track("going through tokens", indices.numel()) as advance:
        for q, chosen in enumerate(indices.tolist()):
            direction = torch.einsum("ld,ldi->li", terms.directions[q], whitener)
            examples = [_example(store, i) for i in chosen]
            parts = tokens.along(direction, examples, advance)
            found.append([part * scale for part, scale in zip(parts, terms.scales[q].tolist(), strict=True)])
            if store.wide_dtype is not None or not store.layout.narrow:
                _require_sums(examples, found[-1], terms.by_block[q].sum(1).tolist())
    return found


class _TokenPass:
    """Passes of a store's model that give each token's product with a direction of the store's rows."""

    def __init__(self, store: Store, model: nn.Module) -> None:
        weights = store.spec.weights(model)
        self._block_of = store.spec.block_of(model)
        self._sketches = {n: Sketch(weight, store.spec, store.correction) for n, weight in weights.items()}
        self._tap = GradientTap(weights, self._add)
        self._lean = LeanPass(model, [weight.module for weight in weights.values()])
        self._loss = output_function(store.output)
        self._direction, self._terms = torch.empty(0), torch.empty(0)

    def along(
        self, direction: torch.Tensor, examples: Sequence[Encoded], on_batch: Callable[[int], None]
    ) -> list[torch.Tensor]:
        """Each example's (T,) float32, given a direction (L, d) of rows that are not whitened."""
        self._direction = direction
        found = [torch.zeros(len(example)) for example in examples]
        counted = [i for i, example in enumerate(examples) if has_loss(example)]
        on_batch(len(examples) - len(counted))
        for members in self._lean.batches([len(examples[i]) for i in counted], BATCH_TOKENS):
            batch = [counted[j] for j in members]
            # Each token's rows are told apart along one dimension, so what cannot be packed runs by itself.
            together = self._lean.can_pack([examples[i] for i in batch])
            for group in [batch] if together else [[i] for i in batch]:
                terms = self._run([examples[i] for i in group])
                for i, part in zip(group, terms.split([len(examples[i]) for i in group]), strict=True):
                    found[i] = part
                on_batch(len(group))
        return found

    def _run(self, examples: Sequence[Encoded]) -> torch.Tensor:
        batch = self._lean.arrange(examples)
        self._terms = torch.zeros(batch.tokens.numel())
        self._tap.offsets = torch.arange(len(self._terms) + 1)
        with self._lean, self._tap:
            self._lean.run(batch, self._loss)
        return self._terms

    def _add(self, use: Use) -> None:
        self._terms += self._sketches[use.name].along(use, self._direction[self._block_of[use.name]]).cpu()


def _example(store: Store, index: int) -> Encoded:
    tokens = store.tokens(index)
    return Encoded(store.id(index), store.text(index), tokens, tokens)


def _require_sums(
    examples: Sequence[Encoded], terms: Sequence[torch.Tensor], scores: Sequence[float]
) -> None:
    for example, part, score in zip(examples, terms, scores, strict=True):
        total = part.sum().item()
        if not abs(total - score) <= 0.05 * abs(score) + 1e-3:
            raise ValueError(
                f"by_token: the tokens of example {example.id!r} sum to {total:.4f}, its score is {score:.4f}; was it "
                "built with labels of its own? A store does not keep them"
            )
