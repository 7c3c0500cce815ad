"""Short names for large things, so that a store knows what it was built from."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import nn

from trackstar.curvature import Curvature
from trackstar.errors import StoreError
from trackstar.gradients.examples import Encoded
from trackstar.optimizer.correction import Correction


class Built(Protocol):
    """What knows the model that it was built with: a store, or factors."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def identity(self) -> dict[str, Any]:
        """What it was built with, with the values of :func:`of_model` and :func:`of_tokenizer`."""


def of_model(model: nn.Module) -> dict[str, object]:
    """Class, parameter count and a hash of every weight and buffer (which hold, say, the rotary frequencies)."""
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fingerprint": of_tensors([*model.named_parameters(), *model.named_buffers()]),
    }


def of_examples(examples: Sequence[Encoded]) -> dict[str, object]:
    """Number of examples and a hash of their ids, texts, metadata, tokens and labels, in order."""
    digest = xxhash.xxh3_128()
    for example in examples:
        digest.update(json.dumps([example.id, example.text, example.metadata, len(example)]).encode())
        digest.update(example.tokens.tobytes())
        digest.update(example.labels.tobytes())
    return {"examples": len(examples), "fingerprint": digest.hexdigest()}


def of_tokenizer(tokenizer: Any) -> str | None:
    """Hash of the vocabulary, None where there is no tokenizer or it keeps no vocabulary."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    return xxhash.xxh3_128_hexdigest(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())


def of_correction(correction: Correction | None) -> dict[str, object] | None:
    """Kind, rank, source of V and a hash of the tensors."""
    if correction is None:
        return None
    tensors = list(correction.scales.items())
    tensors += [
        (f"{name}/{i}", half) for name, pair in correction.factors.items() for i, half in enumerate(pair)
    ]
    return {
        "kind": correction.kind,
        "rank": correction.rank,
        "source": correction.source,
        "fingerprint": of_tensors(sorted(tensors, key=lambda item: item[0])),
    }


def of_curvature(curvature: Curvature) -> str:
    """Hash of R_train."""
    return of_tensors([("train", curvature.train)])


def require_same(model: nn.Module, tokenizer: Any, built: Built) -> None:
    """Require the model and tokenizer that a store, or factors, were built with.

    Raises:
        StoreError: one is another.
    """
    for field, value in of_model(model).items():
        kept = built.identity["model"].get(field)
        if kept != value:
            raise StoreError(
                f"model must be the one that {built.path} was built with: its {field} is {kept!r}, "
                f"this model's is {value!r}"
            )
    vocabulary, kept = of_tokenizer(tokenizer), built.identity["tokenizer"]
    if None not in (vocabulary, kept) and vocabulary != kept:
        raise StoreError(
            f"tokenizer must be the one that {built.path} was built with; this one's vocabulary differs"
        )


def of_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of the tensors and their names, in order."""
    digest = xxhash.xxh3_128()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
