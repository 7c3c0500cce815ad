"""Influences of training examples: a fast pass for many queries, and an exact one that tells where they come from."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from trackstar.ekfac.capture import OnTokens, TokenBatch, TokenCapture
from trackstar.ekfac.inverse import DampedInverse
from trackstar.gradients.examples import Encoded, EncodedQuery
from trackstar.gradients.losses import output_function
from trackstar.gradients.passes import has_loss
from trackstar.gradients.queries import sequence_weights


@dataclasses.dataclass(frozen=True)
class ThinQueries:
    """Preconditioned gradients of Q queries as products of thin matrices.

    Attributes:
        count: Q.
        factors: {module: U (O, Q, r) and V (I, Q, r)}; query q's gradient is about U[:, q] V[:, q]ᵀ.
    """

    count: int
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Terms:
    """What the influences of n examples on a query are sums of.

    Attributes:
        by_module: (n, L) float64, each module's, in the order of the factors' modules.
        by_token: for each example (T,) float32, what the gradient at each of its tokens contributes.
    """

    by_module: torch.Tensor
    by_token: list[torch.Tensor]

    @property
    def scores(self) -> torch.Tensor:
        """(n,) float64."""
        return self.by_module.sum(1)


def thin_queries(
    capture: TokenCapture, queries: Sequence[EncodedQuery], inverse: DampedInverse, rank: int, output: str
) -> ThinQueries:
    """(G + λI)⁻¹ ∇f of each query, of rank at most ``rank`` in each module."""
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(name: str, x: torch.Tensor, delta: torch.Tensor, query: int) -> None:
        if name not in factors:
            width = min(rank, *capture.shapes[name])
            left, right = (x.new_empty(size, len(queries), width) for size in capture.shapes[name])
            factors[name] = left, right
        left, right = factors[name]
        left[:, query], right[:, query] = inverse.thin(name, x, delta, rank)

    single = [q for q, query in enumerate(queries) if len(query.sequences) == 1]

    def add_singles(name: str, x: torch.Tensor, delta: torch.Tensor, batch: TokenBatch) -> None:
        for i, a, d in zip(batch.members, x.split(batch.tokens), delta.split(batch.tokens), strict=True):
            add(name, a, d, single[i])

    for _ in capture.run([queries[q] for q in single], add_singles, loss=output_function(output)):
        pass
    for q in set(range(len(queries))).difference(single):
        for name, (x, delta) in _weighted_tokens(capture, queries[q], output).items():
            add(name, x, delta, q)
    return ThinQueries(len(queries), factors)


def whole_query(
    capture: TokenCapture, query: EncodedQuery, inverse: DampedInverse, output: str
) -> dict[str, torch.Tensor]:
    """(G + λI)⁻¹ ∇f of one query: {module: (O, I)}."""
    tokens = _weighted_tokens(capture, query, output)
    return {name: inverse.whole(name, x, delta) for name, (x, delta) in tokens.items()}


def _weighted_tokens(
    capture: TokenCapture, query: EncodedQuery, output: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{module: x (n, I), δ (n, O)} of all of a query's sequences, with each one's weight in δ: Σ_t δ_t x_tᵀ = ∇f."""
    (weights,) = sequence_weights(capture.lean, [query], output)
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in capture.shapes}

    def add(name: str, x: torch.Tensor, delta: torch.Tensor, batch: TokenBatch) -> None:
        of_tokens = weights[batch.members].repeat_interleave(torch.tensor(batch.tokens))
        parts[name].append((x, delta * of_tokens[:, None].to(delta)))

    for _ in capture.run(query.sequences, add, loss=output_function(output)):
        pass
    return {
        name: (torch.cat([x for x, _ in all_]), torch.cat([d for _, d in all_]))
        for name, all_ in parts.items()
    }


def scores_of(
    capture: TokenCapture, examples: Sequence[Encoded], queries: ThinQueries, on_batch: Callable[[int], None]
) -> torch.Tensor:
    """Influence of each example on each query, (Q, n) float64: Σ_t δ_tᵀ U Vᵀ x_t, summed over modules.

    Two products with thin matrices for each module; no gradient of an example is formed.
    """
    scores = torch.zeros(queries.count, len(examples), dtype=torch.float64)
    counted = torch.tensor([i for i, example in enumerate(examples) if has_loss(example)], dtype=torch.long)

    def add(name: str, x: torch.Tensor, delta: torch.Tensor, batch: TokenBatch) -> None:
        left, right = queries.factors[name]
        terms = (delta @ left.flatten(1)).mul_(x @ right.flatten(1))
        by_token = terms.unflatten(1, (queries.count, -1)).sum(2)
        by_example = torch.stack([part.sum(0) for part in by_token.split(batch.tokens)], dim=1)
        scores[:, counted[batch.members]] += by_example.cpu()

    _run_counted(capture, examples, counted, add, on_batch)
    return scores


def terms_of(
    capture: TokenCapture,
    examples: Sequence[Encoded],
    query: Mapping[str, torch.Tensor],
    on_batch: Callable[[int], None],
) -> Terms:
    """Influence of each example on one query, term by term: δ_tᵀ P x_t for each module and token t.

    Args:
        capture: what sees the model's gradients.
        examples: what to score.
        query: {module: P (O, I)}.
        on_batch: is told how many examples are done.
    """
    numbers = {name: number for number, name in enumerate(capture.shapes)}
    by_module = torch.zeros(len(examples), len(numbers), dtype=torch.float64)
    by_token = [torch.zeros(len(example)) for example in examples]
    counted = torch.tensor([i for i, example in enumerate(examples) if has_loss(example)], dtype=torch.long)

    def add(name: str, x: torch.Tensor, delta: torch.Tensor, batch: TokenBatch) -> None:
        terms = (delta @ query[name]).mul_(x).sum(1).cpu()
        for position, part in zip(counted[batch.members].tolist(), terms.split(batch.tokens), strict=True):
            by_token[position][: len(part)] += part
            by_module[position, numbers[name]] += part.sum(dtype=torch.float64)

    _run_counted(capture, examples, counted, add, on_batch)
    return Terms(by_module, by_token)


def _run_counted(
    capture: TokenCapture,
    examples: Sequence[Encoded],
    counted: torch.Tensor,
    add: OnTokens,
    on_batch: Callable[[int], None],
) -> None:
    """Run the examples that have a loss; the others have no gradient, and no influence."""
    for batch in capture.run([examples[i] for i in counted.tolist()], add):
        on_batch(len(batch.members))
    if len(counted) < len(examples):
        on_batch(len(examples) - len(counted))
