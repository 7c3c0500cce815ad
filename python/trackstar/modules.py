"""Which of a model's modules are attributed, and how each is seen as a matrix of fan-out × fan-in."""

import fnmatch
import re
from collections.abc import Sequence

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer with its weight stored (fan-in, fan-out).

    Told by its name, so that plain torch models never import transformers.
    """
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__
    )


def is_supported(module: nn.Module) -> bool:
    """Whether gradients of this module's weight can be captured: nn.Linear and transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def fan(module: nn.Module) -> tuple[int, int]:
    """(fan-in, fan-out) of a supported module."""
    rows, cols = module.weight.shape  # type: ignore[misc]
    return (rows, cols) if is_conv1d(module) else (cols, rows)


def select_modules(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The modules to attribute, in the order of ``model.named_modules()``.

    Args:
        model: any torch model.
        patterns: shell patterns of module names ("*.mlp.*"); None takes every linear layer except the output
            embedding (lm_head), that is, all attention and MLP matrices of a language model.

    Raises:
        ValueError: a pattern matches no module or none that can be captured, or the model has no linear layer.
    """
    linear = {name: m for name, m in model.named_modules() if is_supported(m)}
    if patterns is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = {name: m for name, m in linear.items() if m is not head}
        if not chosen:
            raise ValueError(f"model must have linear layers to attribute; {type(model).__name__} has none")
        return chosen
    matched = set()
    for pattern in patterns:
        names = fnmatch.filter(linear, pattern)
        if not names:
            others = fnmatch.filter((name for name, _ in model.named_modules()), pattern)
            found = (
                f"only {others[0]!r}, a {type(model.get_submodule(others[0])).__name__}" if others else "none"
            )
            raise ValueError(
                f"modules: pattern {pattern!r} must match a Linear or Conv1D layer, matched {found}"
            )
        matched.update(names)
    return {name: m for name, m in linear.items() if name in matched}


def layer_index(name: str) -> int | None:
    """The number of the layer that a module belongs to: the first integer in its dotted name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def is_attention(name: str) -> bool:
    """Whether a module's name places it in an attention block."""
    return re.search(r"attn|attention", name) is not None


def group_modules(names: Sequence[str], blocks: str | int) -> dict[str, int]:
    """Block index of each module.

    ``"module"``: each its own block. A number n: n/2 contiguous groups of layers, attention and MLP apart
    (block 2g holds attention, 2g + 1 the MLPs of group g); where the model has no such halves, or n is odd, n
    contiguous groups of modules.

    Raises:
        ValueError: there are more blocks than modules to fill them.
    """
    if blocks == "module":
        return {name: i for i, name in enumerate(names)}
    n = int(blocks)
    layers = sorted({layer for name in names if (layer := layer_index(name)) is not None})
    attention = sum(is_attention(name) for name in names)
    halves = (
        n % 2 == 0 and 0 < attention < len(names) and all(layer_index(name) is not None for name in names)
    )
    if halves:
        rank = {layer: i for i, layer in enumerate(layers)}
        groups = n // 2
        grouped = {
            name: 2 * (rank[layer_index(name)] * groups // len(layers)) + (not is_attention(name))  # type: ignore[index]
            for name in names
        }
    else:
        grouped = {name: i * n // len(names) for i, name in enumerate(names)}
    if len(set(grouped.values())) != n:
        limit = 2 * len(layers) if halves else len(names)
        raise ValueError(f"blocks must be at most {limit} for this model's {len(names)} modules, got {n}")
    return grouped
