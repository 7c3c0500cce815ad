"""Which of a model's weights are captured."""

import fnmatch
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from trackstar.gradients.weights import Rows, Weight, weights_of

ALSO = ("embeddings", "lm_head", "biases", "norms")
"""What can be captured besides attention and MLP matrices."""

Parts = int | Sequence[int]
"""How a fused matrix is cut by rows: a number of equal parts, or their sizes, which repeat if they fall short."""


def select_weights(
    model: nn.Module,
    patterns: Sequence[str] | None = None,
    *,
    also: Sequence[str] = (),
    split: Mapping[str, Parts] | None = None,
) -> dict[str, Weight]:
    """The weights to capture, by name, in the order of ``model.named_modules()``.

    Args:
        model: any torch model.
        patterns: shell patterns of names ("*.mlp.*"); those that begin with "!" leave out what they match. None takes
            all attention and MLP matrices, that is, those of every linear layer, expert and nn.MultiheadAttention
            but not the output embedding (lm_head); of a model with PEFT adapters, those of the active adapters
            alone. Patterns reach all of these and lm_head; and other matrices that a module keeps as a parameter and
            multiplies in its own code, such as a router's, where the part after the last dot spells them out.
        also: any of :data:`ALSO`, within what the patterns match: "embeddings" are all nn.Embedding, "biases" those
            of the matrices, "norms" scales and biases of normalization layers.
        split: {pattern: parts} of fused matrices; a part is a weight of its own, "<name>.<number>".

    Raises:
        ValueError: a pattern or an entry of ``also`` matches nothing that can be captured, a matrix cannot be split
            as asked, or the model has no linear layer.
    """
    every = list(weights_of(model))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = {"matrix"} | {kind for word, kind in _KINDS.items() if word in also}
    allowed = [w for w in every if w.kind in kinds]
    for pattern in patterns or ():
        if not any(_reaches(pattern.removeprefix("!"), w) for w in allowed):
            raise ValueError(_no_match(model, pattern, every))
    wanted = [pattern for pattern in patterns or () if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns or () if pattern.startswith("!")]
    if wanted:
        chosen = [w for w in allowed if any(_reaches(pattern, w) for pattern in wanted)]
    else:
        adapters = _active_adapters(model)
        chosen = [
            w
            for w in allowed
            if (w.usual or w.kind != "matrix")
            and (w.module is not head or "lm_head" in also)
            and (adapters is None or id(w.module) in adapters)
        ]
        if not any(w.kind == "matrix" for w in chosen):
            what = "model" if adapters is None else "the adapters of a model"
            raise ValueError(f"{what} must have linear layers to attribute; {type(model).__name__} has none")
    chosen = [w for w in chosen if not any(_reaches(pattern, w) for pattern in unwanted)]
    if not chosen:
        raise ValueError(f"modules must leave something to capture, got {list(patterns or ())!r}")
    for word in also:
        found = [w for w in chosen if w.module is head] if word == "lm_head" else chosen
        if not any(w.kind == _KINDS.get(word, "matrix") for w in found):
            raise ValueError(
                f"also: {word!r} must be among what is captured of {type(model).__name__}, found none"
            )
    return {w.name: w for w in _split(chosen, {} if split is None else split)}


_KINDS = {"embeddings": "embedding", "biases": "bias", "norms": "norm"}


def _reaches(pattern: str, weight: Weight) -> bool:
    name = re.sub(r"[._](in_proj_)?bias$", "", weight.name) if weight.kind == "bias" else weight.name
    if weight.kind == "norm":
        name = weight.parameter.rpartition(".")[0]
    if weight.kind == "matrix" and not weight.usual and not pattern.rpartition(".")[2].strip("*?"):
        return False
    return fnmatch.fnmatchcase(name, pattern)


def _no_match(model: nn.Module, pattern: str, every: Sequence[Weight]) -> str:
    wanted = f"modules: pattern {pattern!r} must match a matrix that can be captured, matched"
    for word, kind in _KINDS.items():
        other = next((w for w in every if w.kind == kind and _reaches(pattern, w)), None)
        if other is not None:
            return f"{wanted} only {other.name!r}, which takes also=({word!r},)"
    for name, module in model.named_modules():
        if fnmatch.fnmatchcase(name, pattern):
            return f"{wanted} only {name!r}, a {type(module).__name__}"
    return f"{wanted} none"


def _active_adapters(model: nn.Module) -> set[int] | None:
    """Identities of the modules of the model's active PEFT adapters; None for a model that has no adapters."""
    tuned: list[Any] = [
        m for m in model.modules() if hasattr(m, "adapter_layer_names") and hasattr(m, "active_adapters")
    ]
    if not tuned and not hasattr(model, "peft_config"):
        return None
    return {
        id(part)
        for layer in tuned
        for kind in layer.adapter_layer_names
        for name, adapter in getattr(layer, kind, nn.ModuleDict()).items()
        if name in layer.active_adapters and isinstance(adapter, nn.Module)
        for part in adapter.modules()
    }


def _split(weights: Sequence[Weight], split: Mapping[str, Parts]) -> list[Weight]:
    result: list[Weight] = []
    unused = set(split)
    for weight in weights:
        pattern = next((p for p in split if fnmatch.fnmatchcase(weight.name, p)), None)
        if pattern is None or weight.kind != "matrix":
            result.append(weight)
            continue
        unused.discard(pattern)
        fan_out, fan_in = weight.shape
        for i, (rows, count) in enumerate(_cut(weight.name, fan_out, split[pattern])):
            result.append(replace(weight, name=f"{weight.name}.{i}", rows=rows, shape=(count, fan_in)))
    if unused:
        raise ValueError(f"split: pattern {min(unused)!r} must match a matrix that is captured, matched none")
    return result


def _cut(name: str, fan_out: int, parts: Parts) -> list[tuple[Rows, int]]:
    """Rows of each part, and how many they are."""
    sizes = [fan_out // parts] * parts if isinstance(parts, int) else list(parts)
    total = sum(sizes)
    if total == 0 or fan_out % total or (isinstance(parts, int) and total != fan_out):
        raise ValueError(f"split: {parts} must divide the {fan_out} rows of {name!r}")
    starts = range(0, fan_out, total)
    result: list[tuple[Rows, int]] = []
    for start, stop in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
        rows: Rows = slice(start, stop)
        if len(starts) > 1:
            rows = torch.cat([torch.arange(s + start, s + stop) for s in starts])
        result.append((rows, len(starts) * (stop - start)))
    return result
