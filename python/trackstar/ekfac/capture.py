"""What EK-FAC sees of a model: every token's input and output gradient at each attributed matrix."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from trackstar.gradients.examples import IGNORED, Encoded
from trackstar.gradients.lean import Batch, LeanPass
from trackstar.gradients.losses import Loss, nll
from trackstar.gradients.modules import select_weights
from trackstar.gradients.passes import BATCH_TOKENS
from trackstar.gradients.tap import GradientTap
from trackstar.gradients.weights import Use


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Which examples run together.

    Attributes:
        members: their positions among those that are run.
        tokens: how many tokens of each are shown, see :func:`reaching`.
    """

    members: list[int]
    tokens: list[int]


OnTokens = Callable[[str, torch.Tensor, torch.Tensor, TokenBatch], None]
"""Takes a module's name, its inputs (n, I) and output gradients (n, O), float32, of a batch's tokens, example after
example, and which examples they are of."""


class TokenCapture:
    """Lean passes that show every token's input x and output gradient δ at each attributed matrix.

    The gradient of an example's loss by a matrix is g = Σ_t δ_t x_tᵀ (O, I), over the example's tokens t.

    Args:
        model: a causal language model of transformers.
        patterns: shell patterns of the modules to see; None takes all attention and MLP matrices.
        biases: take a module's bias as one more column of its matrix, which meets a 1 in every token's input.

    Attributes:
        modules: {name: module} of what is seen, in the order of ``model.named_modules()``.
        shapes: {name: (O, I)} of their matrices; I counts the bias.
        lean: the passes.

    Raises:
        ValueError: a pattern matches nothing that can be captured, or an expert.
    """

    def __init__(
        self, model: nn.Module, patterns: Sequence[str] | None = None, *, biases: bool = False
    ) -> None:
        self._weights = select_weights(model, patterns)
        self.modules = {name: weight.module for name, weight in self._weights.items()}
        self.shapes = {}
        for name, weight in self._weights.items():
            if weight.followed:
                raise ValueError(
                    f"modules must be layers that see every token once; {name!r} is not (an expert, or fused "
                    f"attention): leave it out, as by modules=[{'!' + name!r}]"
                )
            fan_out, fan_in = weight.shape
            self.shapes[name] = fan_out, fan_in + (biases and weight.module.bias is not None)
        self.lean = LeanPass(model, self.modules.values())

    def run(
        self,
        examples: Sequence[Encoded],
        on_tokens: OnTokens,
        *,
        loss: Loss = nll,
        labels_of: Callable[[int], torch.Tensor] | None = None,
    ) -> Iterator[TokenBatch]:
        """Run the model forward and backward over examples, of which each has a prediction that counts.

        Batches are formed from the examples' lengths alone.

        Args:
            examples: what to run.
            on_tokens: called for each batch and module, with the tokens that :func:`reaching` counts.
            loss: whose gradient is shown, summed over an example's predictions.
            labels_of: what ``loss`` gets in the place of the labels of the example at this position, a row for each
                prediction; None for its labels.

        Yields:
            Each batch, after ``on_tokens`` has seen it at every module.

        Raises:
            FloatingPointError: an input or gradient is NaN or Inf; names the example and the module.
            RuntimeError: a module does not see every token once: no single x and δ of a token tell its gradient.
        """
        for members in self.lean.batches([len(example) for example in examples], BATCH_TOKENS):
            view = _BatchView(members, [examples[i] for i in members], self, on_tokens)
            arranged = self.lean.arrange(view.examples)
            if labels_of is not None:
                labels = torch.cat([labels_of(i) for i in members])
                arranged = dataclasses.replace(arranged, labels=labels.to(arranged.labels.device))
            view.place(arranged)
            with self.lean, GradientTap(self._weights, view.show, view.start):
                self.lean.run(arranged, loss)
            view.require_complete()
            yield view.batch


def reaching(example: Encoded) -> int:
    """Tokens of an example that reach its loss: those before the last label that counts."""
    return int(np.flatnonzero(example.labels != IGNORED)[-1])


class _BatchView:
    """One batch, as its tokens come by."""

    def __init__(
        self, members: list[int], examples: Sequence[Encoded], capture: TokenCapture, on_tokens: OnTokens
    ) -> None:
        self.examples = examples
        self.batch = TokenBatch(members, [reaching(example) for example in examples])
        self._shapes = capture.shapes
        self._on_tokens = on_tokens
        self._calls = dict.fromkeys(capture.shapes, 0)
        self._shown = dict.fromkeys(capture.shapes, 0)
        self._places = torch.empty(0)

    def place(self, arranged: Batch) -> None:
        """Find the tokens that reach a loss among those of the batch, padding and all."""
        width = arranged.tokens.shape[1]
        starts = (
            itertools.accumulate(arranged.lengths, initial=0)
            if arranged.positions is not None
            else itertools.count(0, width)
        )
        places = [torch.arange(start, start + n) for start, n in zip(starts, self.batch.tokens, strict=False)]
        self._places = torch.cat(places).to(arranged.tokens.device)

    def start(self, name: str) -> None:
        """A module runs."""
        self._calls[name] += 1

    def show(self, use: Use) -> None:
        """A module's inputs (B, T, I) and output gradients (B, T, O)."""
        name, x, delta = use.name, use.activations, use.output_grads
        self._shown[name] += 1
        x, delta = x.flatten(0, 1), delta.flatten(0, 1)
        if len(x) <= self._places[-1]:
            raise RuntimeError(f"module {name!r} must see every token of a batch, got {len(x)}")
        x, delta = x[self._places].float(), delta[self._places].float()
        for kind, values in (("input", x), ("gradient", delta)):
            self._require_finite(name, kind, values)
        if x.shape[1] < self._shapes[name][1]:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self._on_tokens(name, x, delta, self.batch)

    def _require_finite(self, name: str, kind: str, values: torch.Tensor) -> None:
        # A finite sum is quick to find, and has finite terms.
        if values.sum().isfinite() or values.isfinite().all():
            return
        bad = int(values.isfinite().all(dim=1).logical_not().nonzero()[0])
        example = self.examples[int(np.searchsorted(np.cumsum(self.batch.tokens), bad, side="right"))]
        raise FloatingPointError(
            f"the {kind} of example {example.id!r} at {name!r} holds NaN or Inf: {example.text[:60]!r}"
        )

    def require_complete(self) -> None:
        """Require every module to have run, and to have been shown, once."""
        for name, calls in self._calls.items():
            if (calls, self._shown[name]) != (1, 1):
                what = f"ran {calls} times" if calls != 1 else "received no gradient"
                raise RuntimeError(
                    f"module {name!r} {what} in a pass, where EK-FAC needs once; leave it out of modules"
                )
