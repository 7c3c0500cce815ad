"""The engine's own pass of a causal language model over examples, forward and backward, and nothing else."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trackstar.collector import GradientCollector
from trackstar.correction import Correction
from trackstar.examples import IGNORED, Encoded, check_vocabulary, encode_examples, length_batches
from trackstar.losses import Loss, nll
from trackstar.spec import SketchSpec

BATCH_TOKENS = 512
"""Padded tokens in a batch: enough for the GEMMs to run at full speed, few enough for the logits to stay small."""

WINDOW = 256
"""Examples that :func:`collect_rows` sorts by length, and yields, at a time."""


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


def run_batch(model: nn.Module, batch: Sequence[Encoded], loss: Loss = nll) -> None:
    """One forward and backward pass over a batch, padded on the right.

    No attention mask is needed: a causal model never sees the padding that follows an example, and the
    padding has no label.
    """
    device = next(model.parameters()).device
    width = max(len(example) for example in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), IGNORED)
    for i, example in enumerate(batch):
        tokens[i, : len(example)] = torch.from_numpy(example.tokens)
        labels[i, : len(example)] = torch.from_numpy(example.labels)
    with torch.enable_grad():
        logits = model(input_ids=tokens.to(device), use_cache=False).logits
        loss(logits, labels.to(device)).backward()


def has_loss(example: Encoded) -> bool:
    """Whether any prediction of the example counts towards its loss."""
    return bool((example.labels[1:] != IGNORED).any())


def check_model(model: nn.Module) -> None:
    """Require finite weights.

    Raises:
        ValueError: a weight holds NaN or Inf.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"model must have finite weights; {name!r} holds NaN or Inf")


def vocabulary_size(model: nn.Module) -> int:
    """Token ids that the model's input embedding knows."""
    return model.get_input_embeddings().num_embeddings  # type: ignore[operator]


def position_limit(model: nn.Module) -> int | None:
    """The longest sequence that the model's configuration allows, None where it sets no limit."""
    return getattr(model.config, "max_position_embeddings", None)


def rows_of(
    model: nn.Module,
    examples: Sequence[Encoded],
    collector: GradientCollector,
    *,
    loss: Loss = nll,
    on_batch: Callable[[int], None] = lambda count: None,
) -> torch.Tensor:
    """Rows (n, L, d) float32 on the CPU, in the order of ``examples``.

    Batches are formed from these examples' lengths alone, so the result is a pure function of the model, the
    examples and the collector's spec and correction. An example without any label that counts (empty, a single
    token, all masked) has a row of zeros.

    Raises:
        FloatingPointError: an example's gradient is NaN or Inf.
    """
    counted = [i for i, example in enumerate(examples) if has_loss(example)]
    rows = torch.zeros(len(examples), *collector.row_shape)
    with evaluating(model):
        for batch in length_batches([len(examples[i]) for i in counted], BATCH_TOKENS):
            positions = [counted[j] for j in batch]
            with collector:
                run_batch(model, [examples[i] for i in positions], loss)
            found = collector.rows.cpu()
            finite = found.flatten(1).isfinite().all(dim=1)
            if not finite.all():
                bad = examples[positions[int(finite.logical_not().nonzero()[0])]]
                raise FloatingPointError(
                    f"the gradient of example {bad.id!r} holds NaN or Inf: {bad.text[:60]!r}"
                )
            rows[positions] = found
            on_batch(len(batch))
    if len(counted) < len(examples):
        on_batch(len(examples) - len(counted))
    return rows


def collect_rows(
    model: nn.Module,
    examples: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    spec: SketchSpec | None = None,
    correction: Correction | None = None,
    loss: Loss = nll,
) -> Iterator[torch.Tensor]:
    """Projected, corrected gradients of a corpus, neither whitened nor written: what :func:`build_store` runs.

    Args:
        model: a causal language model of transformers.
        examples: {"text": …} or {"input_ids": …, "labels": … (optional)}.
        tokenizer: the model's, for examples given as text.
        spec: what to capture; None is ``SketchSpec()``.
        correction: optimizer correction, or None.
        loss: output function, by default the full-sequence negative log-likelihood, summed over tokens.

    Yields:
        (n, L, d) float32 on the CPU, in the order of the examples.

    Raises:
        ValueError: there are no examples, one is malformed, or the model has weights that are not finite.
        FloatingPointError: an example's gradient is NaN or Inf.
    """
    encoded = encode_examples(examples, tokenizer, position_limit(model))
    check_vocabulary(encoded, vocabulary_size(model), "examples")
    check_model(model)
    collector = GradientCollector(model, spec, correction)
    for start in range(0, len(encoded), WINDOW):
        yield rows_of(model, encoded[start : start + WINDOW], collector, loss=loss)
