"""Rows of examples: what the engine runs a causal language model for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trackstar.gradients.collector import GradientCollector
from trackstar.gradients.examples import IGNORED, Encoded, check_vocabulary, encode_examples
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.losses import Loss, nll, output_function
from trackstar.gradients.spec import SketchSpec
from trackstar.optimizer.correction import Correction

BATCH_TOKENS = 1024
"""Tokens in a batch: enough for the GEMMs to run at full speed, few enough for the activations to stay small."""

WINDOW = 256
"""Examples that :func:`collect_rows` sorts by length, and yields, at a time."""


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
    lean: LeanPass,
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
        FloatingPointError: an example's gradient is NaN or Inf; names the example and the first module.
    """
    counted = [i for i, example in enumerate(examples) if has_loss(example)]
    rows = torch.zeros(len(examples), *collector.row_shape)
    with lean:
        for members in lean.batches([len(examples[i]) for i in counted], BATCH_TOKENS):
            positions = [counted[j] for j in members]
            batch = lean.arrange([examples[i] for i in positions])
            collector.offsets, collector.shape = batch.offsets, batch.shape
            with collector:
                lean.run(batch, loss)
            damage = collector.not_finite()
            if damage is not None:
                bad, name = examples[positions[damage[0]]], damage[1]
                raise FloatingPointError(
                    f"the gradient of example {bad.id!r} by {name!r} holds NaN or Inf: {bad.text[:60]!r}"
                )
            rows[positions] = collector.rows.cpu()
            on_batch(len(members))
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
    output: str = "loss",
) -> Iterator[torch.Tensor]:
    """Projected, corrected gradients of a corpus, neither whitened nor written: what :func:`build_store` runs.

    Args:
        model: a causal language model of transformers.
        examples: {"text": …} or {"input_ids": …, "labels": … (optional)}.
        tokenizer: the model's, for examples given as text.
        spec: what to capture; None is ``SketchSpec()``.
        correction: optimizer correction, or None.
        output: what a row is the gradient of, summed over the example's tokens: "loss" (the negative
            log-likelihood), "margin" or "logit".

    Yields:
        (n, L, d) float32 on the CPU, in the order of the examples.

    Raises:
        ValueError: there are no examples, one is malformed, ``output`` is unknown, or the model has weights that
            are not finite.
        FloatingPointError: an example's gradient is NaN or Inf.
    """
    loss = output_function(output)
    encoded = encode_examples(examples, tokenizer, position_limit(model))
    check_vocabulary(encoded, vocabulary_size(model), "examples")
    check_model(model)
    collector = GradientCollector(model, spec, correction)
    lean = LeanPass(model, collector.modules.values())
    for start in range(0, len(encoded), WINDOW):
        yield rows_of(lean, encoded[start : start + WINDOW], collector, loss=loss)
