"""Forward and backward passes of a causal language model that compute what attribution needs, and nothing else.

Left out against a training step: the gradient of every weight, of the embedding and of a tied output embedding;
the input gradient of the first captured modules (the graph starts at their outputs, see tap.py); the batch's
logits, which exist for a chunk of tokens at a time; and padding, as examples of any lengths follow each other
in one row. The last two depend on how the model is built, so they are tried on a few tokens first, and a model
whose results they would change runs without them.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn

from trackstar.gradients.examples import IGNORED, Encoded, length_batches
from trackstar.gradients.losses import Loss, nll

CHUNK_TOKENS = 256
"""Tokens whose logits exist at a time: enough for the GEMMs to run at full speed."""

PACKED = "trackstar_packed"
"""Name of :func:`_attend` among transformers' attention functions."""

T = TypeVar("T")

_lengths: contextvars.ContextVar[Sequence[int]] = contextvars.ContextVar("_lengths")
"""Lengths of the examples in the row that is being run."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples as a pass runs them.

    Attributes:
        tokens: (B, T) int64, padded on the right; or packed, (1, ΣT).
        positions: (1, ΣT) int64, each token's place in its example; None where padded.
        lengths: tokens of each example.
        predicting: (n,) int64, where in ``tokens.flatten()`` the predictions that count are made.
        labels: (n,) int64, what they should have been.
    """

    tokens: torch.Tensor
    positions: torch.Tensor | None
    lengths: Sequence[int]
    predicting: torch.Tensor
    labels: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T) of the tokens; (1, ΣT) where packed."""
        rows, length = self.tokens.shape
        return rows, length

    @property
    def offsets(self) -> torch.Tensor | None:
        """(B + 1,) int64, where packed examples begin, and the end; None where padded."""
        if self.positions is None:
            return None
        return torch.tensor([0, *self.lengths]).cumsum(0)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, and no gradient of any weight, inside the block; both are put back after it."""
    training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(training)


class LeanPass:
    """Lean passes of one model: inside a ``with`` block, :meth:`run` on what :meth:`arrange` returns.

    Args:
        model: a causal language model of transformers.
        captured: the modules whose gradients are wanted.
        has_weights: False for a model of shapes alone, on which nothing can be tried: it is taken to allow what its
            structure does.

    Attributes:
        model: the model.
        can_pad: whether the model is known not to mind what follows an example.
        skipped: why the model runs without a shortcut, a sentence for each; empty where all are taken.
    """

    def __init__(
        self, model: nn.Module, captured: Collection[nn.Module], *, has_weights: bool = True
    ) -> None:
        self.model: Any = model
        self._captured = captured
        self._has_weights = has_weights
        self._own_attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        self._inside = contextlib.ExitStack()
        self.skipped: list[str] = []
        self._decoder: nn.Module | None = None
        with self, torch.no_grad():
            self._decoder = self._try("the logits of the whole batch are kept", self._find_decoder)
            self._longest_packed = self._try("batches are padded", self._find_longest_packed) or 0
            self.can_pad = self._try("some examples run one by one", self._check_padding) or False

    def _try(self, without: str, find: Callable[[], T]) -> T | None:
        """What ``find`` finds, or None and a note of what the pass is like ``without`` it."""
        try:
            return find()
        except _Unsafe as reason:
            self.skipped.append(f"{without}: {reason}")
        except Exception as error:  # whatever the model's own code raises
            self.skipped.append(f"{without}: trying raised {type(error).__name__}: {error}")
        return None

    def __enter__(self) -> "LeanPass":
        self._inside.enter_context(evaluating(self.model))
        self._inside.callback(self._set_attention, self._own_attention)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside.close()

    def batches(self, lengths: Sequence[int], budget: int) -> list[list[int]]:
        """Positions of examples of these lengths in batches of at most ``budget`` tokens."""
        batches = length_batches(lengths, budget, padded=not self._longest_packed)
        if self.can_pad:
            return batches
        return [
            part
            for batch in batches
            for part in ([batch] if lengths[batch[-1]] <= self._longest_packed else [[i] for i in batch])
        ]

    def logit_tokens(self, tokens: int) -> int:
        """Tokens, of a batch of ``tokens``, whose logits exist at once; counted double where gradients join them."""
        return 2 * tokens if self._decoder is None else min(tokens, CHUNK_TOKENS)

    def can_pack(self, examples: Sequence[Encoded]) -> bool:
        """Whether these examples may follow each other in one row."""
        return max(len(example) for example in examples) <= self._longest_packed

    def arrange(self, examples: Sequence[Encoded], *, packed: bool | None = None) -> Batch:
        """The examples as one batch on the model's device, packed if asked or, where nobody asks, if they can be."""
        lengths = [len(example) for example in examples]
        longest = max(lengths)
        packed = self.can_pack(examples) if packed is None else packed
        shape = (1, sum(lengths)) if packed else (len(lengths), longest)
        tokens, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
        starts = [0, *itertools.accumulate(lengths if packed else [longest] * len(lengths))]
        for example, start in zip(examples, starts, strict=False):
            stop = start + len(example)
            tokens.view(-1)[start:stop] = torch.from_numpy(example.tokens)
            # A label moves to the position that predicts it.
            labels.view(-1)[start : stop - 1] = torch.from_numpy(example.labels[1:])
        positions = torch.cat([torch.arange(length) for length in lengths])[None] if packed else None
        predicting = (labels.view(-1) != IGNORED).nonzero().flatten()
        device = next(self.model.parameters()).device
        return Batch(
            tokens.to(device),
            None if positions is None else positions.to(device),
            lengths,
            predicting.to(device),
            labels.view(-1)[predicting].to(device),
        )

    def run(self, batch: Batch, loss: Loss = nll) -> None:
        """One forward and backward pass over a batch.

        No attention mask is needed where it is padded: the model was seen not to mind what follows an example, and
        the padding has no label.
        """
        with torch.enable_grad():
            output = self._forward(batch.tokens, batch.positions, batch.lengths)
        flat = output.detach().flatten(0, -2)
        chosen = flat[batch.predicting]
        by_output = torch.zeros_like(flat)
        if self._decoder is None:
            by_output[batch.predicting] = loss(chosen.float(), batch.labels).to(flat.dtype)
        else:
            by_output[batch.predicting] = self._through_head(chosen, batch.labels, loss)
        output.backward(by_output.view_as(output))

    def values(self, batch: Batch, of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """A value of each prediction that counts, (n,), in the batch's order: one forward pass.

        Args:
            batch: from :meth:`arrange`.
            of: (logits (m, V) float32, labels (m,)) to the values (m,) of m predictions.
        """
        with torch.no_grad():
            output = self._forward(batch.tokens, batch.positions, batch.lengths)
            chosen = output.flatten(0, -2)[batch.predicting]
            parts = zip(chosen.split(CHUNK_TOKENS), batch.labels.split(CHUNK_TOKENS), strict=True)
            head = self.model.get_output_embeddings() if self._decoder is not None else nn.Identity()
            return torch.cat([of(head(part).float(), labels) for part, labels in parts])

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor | None, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Last hidden state of the decoder, where there is one, else logits of the model: (B, T, features)."""
        self._set_attention(self._own_attention if positions is None else PACKED)
        if positions is None and self._spells_positions:
            # Of a row's own: an embedding of positions that is shared by the batch has a gradient of all its examples.
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        places = {} if positions is None else {"position_ids": positions}
        before = _lengths.set(lengths)
        try:
            if self._decoder is None:
                return self.model(input_ids=tokens, use_cache=False, **places).logits
            return self._decoder(input_ids=tokens, use_cache=False, **places).last_hidden_state
        finally:
            _lengths.reset(before)

    @functools.cached_property
    def _spells_positions(self) -> bool:
        """Whether padded rows are told their positions: where an embedding is captured, if the model takes them."""
        embeds = any(isinstance(module, nn.Embedding) for module in self._captured)
        return embeds and "position_ids" in inspect.signature(self.model.forward).parameters

    def _set_attention(self, name: str | None) -> None:
        if name is not None and name != self.model.config._attn_implementation:
            self.model.set_attn_implementation(name)

    def _through_head(self, hidden: torch.Tensor, labels: torch.Tensor, loss: Loss) -> torch.Tensor:
        """Gradient (n, H) of the loss by the head's inputs (n, H), a chunk of logits at a time."""
        head = self.model.get_output_embeddings()
        by_hidden = torch.empty_like(hidden)
        with torch.no_grad():
            for part, answers, out in zip(
                *(t.split(CHUNK_TOKENS) for t in (hidden, labels, by_hidden)), strict=True
            ):
                logits = torch.mm(part, head.weight.T, out=self._scores[: len(part)])
                if head.bias is not None:
                    logits += head.bias
                torch.mm(loss(logits.float(), answers).to(hidden.dtype), head.weight, out=out)
        return by_hidden

    @functools.cached_property
    def _scores(self) -> torch.Tensor:
        """Room for a chunk's logits, the same for every batch."""
        weight = self.model.get_output_embeddings().weight
        return torch.empty(CHUNK_TOKENS, len(weight), dtype=weight.dtype, device=weight.device)

    def _find_decoder(self) -> nn.Module:
        """The part of the model that ends in the head's inputs.

        Raises:
            _Unsafe: the head may not be run by itself.
        """
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise _Unsafe(f"its output embedding is a {type(head).__name__}, not a plain Linear")
        if head in self._captured:
            raise _Unsafe("its output embedding is captured")
        decoder: nn.Module = self.model.get_decoder()
        tokens = _probe(self.model, 12)
        hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        logits = self.model(input_ids=tokens, use_cache=False).logits
        if self._has_weights and not torch.equal(head(hidden), logits):
            raise _Unsafe("its logits are not the plain product of hidden states and output embedding")
        return decoder

    def _find_longest_packed(self) -> int:
        """Tokens of the longest example that may be packed.

        Raises:
            _Unsafe: packing would change the model's results.
        """
        from transformers import AttentionInterface

        model = self.model
        if not model._can_set_attn_implementation() or model.config.sub_configs:
            raise _Unsafe("its attention cannot be replaced")
        AttentionInterface.register(PACKED, _attend)
        first, second = _probe(model, 12).split((5, 7), dim=1)
        places = torch.cat([torch.arange(5), torch.arange(7)])[None].to(first.device)
        alone = torch.cat([self._forward(tokens, None, ()) for tokens in (first, second)], dim=1)
        packed, other = (
            self._forward(torch.cat([start, second], dim=1), places, (5, 7))
            for start in (first, first.flip(1))
        )
        self._require_same("packed in one row", packed[:, 5:], other[:, 5:], packed, alone)
        windows = (getattr(model.config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        return min((window for window in windows if window is not None), default=2**62)

    def _check_padding(self) -> bool:
        """Whether examples may be padded, to be run together.

        Raises:
            _Unsafe: padding would change the model's results.
        """
        first, second = _probe(self.model, 12).split((5, 7), dim=1)
        alone = torch.cat([self._forward(tokens, None, ())[0] for tokens in (first, second)])
        padded, other = (
            self._forward(torch.cat([nn.functional.pad(start, (0, 2)), second]), None, ())
            for start in (first, first.flip(1))
        )
        self._require_same("padded", padded[1], other[1], torch.cat([padded[0, :5], padded[1]]), alone)
        return True

    def _require_same(
        self, how: str, one: torch.Tensor, other: torch.Tensor, together: torch.Tensor, alone: torch.Tensor
    ) -> None:
        """Require the same results beside ``one`` example as beside an ``other``, and together as alone."""
        if not self._has_weights:
            return
        size, eps = alone.abs().max(), torch.finfo(alone.dtype).eps
        # Too strict costs a model of narrow weights some speed; too lax would cost it its results.
        if not (together - alone).abs().max() <= min(1e4 * eps, 0.03) * size:
            raise _Unsafe(f"examples {how} give other results than by themselves")
        # Sharper: a batch's shape may change the rounding, but the content of other examples may not.
        if not (one - other).abs().max() <= min(10 * eps, 0.03) * size:
            raise _Unsafe(f"examples {how} see each other")


class _Unsafe(Exception):
    """Why a shortcut would change results."""


def _probe(model: nn.Module, length: int) -> torch.Tensor:
    """A few different tokens (1, length), always the same."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return (1 + 37 * torch.arange(length, device=embedding.weight.device))[None] % embedding.num_embeddings


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each packed example, through torch's fused kernel.

    Called by transformers, which makes no mask for an attention function that it does not know.

    Args:
        module: the attention layer.
        query: (1, heads, ΣT, head size).
        key: (1, key–value heads, ΣT, head size).
        value: likewise.
        attention_mask: None.
        options: what transformers passes to every attention function.

    Returns:
        (1, ΣT, heads, head size), and None in the place of the attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    outputs, start = [], 0
    for length, group in itertools.groupby(_lengths.get()):  # equal lengths share a call
        count = len(list(group))
        stop = start + count * length
        q, k, v = (
            t[0, :, start:stop].unflatten(1, (count, length)).transpose(0, 1) for t in (query, key, value)
        )
        output, _ = sdpa_attention_forward(module, q, k, v, None, **options)
        outputs.append(output.flatten(0, 1))
        start = stop
    return torch.cat(outputs)[None], None
