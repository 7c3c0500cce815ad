"""Layer blocks: which of the captured weights share one."""

import fnmatch
import itertools
import re
from collections.abc import Mapping, Sequence

Blocks = str | int | Mapping[str, str]
"""How weights are grouped: "module", a number of layer blocks, or {pattern: group}."""


def is_attention(name: str) -> bool:
    """Whether a weight's name places it in attention; "post_attention_layernorm" and the like do not."""
    return re.search(r"(?:^|\.)(?![^.]*norm)[^.]*(?:attn|attention)", name) is not None


def group_weights(names: Sequence[str], blocks: Blocks) -> dict[str, str]:
    """Name of the block of each weight. Blocks are in the order in which the weights first have them.

    - ``"module"``: each weight its own.
    - A number n: attention and MLPs apart, n // 2 blocks of attention and the rest of MLPs, each of contiguous layers.
      A weight outside the layers goes with the MLPs: of the layer before it, or of the first. n = 1, or a model
      without attention or layers: n contiguous runs of weights.
    - {pattern: group}: as it says; every weight has to match the patterns of one group.

    Args:
        names: of all weights, in the order of ``model.named_modules()``.
        blocks: the grouping.

    Raises:
        ValueError: there are more blocks than layers or weights to fill them, a weight has no group or several, or a
            pattern matches no weight.
    """
    if isinstance(blocks, Mapping):
        return _by_pattern(names, blocks)
    if blocks == "module":
        return {name: name for name in names}
    n = int(blocks)
    layers = _layers(names)
    if n == 1 or not layers or len({is_attention(name) for name in names}) == 1:
        if n > len(names):
            raise _too_many(n, len(names), names)
        return _label(names, [i * n // len(names) for i in range(len(names))], names, "")
    grouped: dict[str, str] = {}
    attention = [name for name in names if is_attention(name)]
    others = [name for name in names if not is_attention(name)]
    counts = {
        "attention": len({layers[name] for name in attention}),
        "MLP": len({layers[name] for name in others}),
    }
    if n // 2 > counts["attention"] or n - n // 2 > counts["MLP"]:
        raise _too_many(n, min(2 * counts["attention"] + 1, 2 * counts["MLP"]), names)
    for half, kind, count in ((attention, "attention", n // 2), (others, "MLP", n - n // 2)):
        own = [layers[name] for name in half]
        rank = {layer: i for i, layer in enumerate(dict.fromkeys(own))}
        grouped |= _label(half, [rank[layer] * count // len(rank) for layer in own], own, f" {kind}")
    return {name: grouped[name] for name in names}


def number_blocks(grouped: Mapping[str, str]) -> dict[str, int]:
    """Index of each weight's block, given the block's name."""
    numbers = {block: i for i, block in enumerate(dict.fromkeys(grouped.values()))}
    return {name: numbers[block] for name, block in grouped.items()}


def _by_pattern(names: Sequence[str], blocks: Mapping[str, str]) -> dict[str, str]:
    grouped = {}
    for name in names:
        found = {group: p for p, group in blocks.items() if fnmatch.fnmatchcase(name, p)}
        if len(found) != 1:
            got = "none" if not found else ", ".join(f"{p!r} ({group!r})" for group, p in found.items())
            raise ValueError(f"blocks must put {name!r} into one group, it matches {got}")
        grouped[name] = next(iter(found))
    for pattern in blocks:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"blocks: pattern {pattern!r} must match something that is captured, matched none"
            )
    return grouped


def _layers(names: Sequence[str]) -> dict[str, str]:
    """{name: its layer}, the part of the name up to the first number; empty where no name has any."""
    found = {name: match[0] for name in names if (match := re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", name))}
    if not found:
        return {}
    layer = next(iter(found.values()))
    return {name: (layer := found.get(name, layer)) for name in names}


def _label(names: Sequence[str], groups: Sequence[int], places: Sequence[str], kind: str) -> dict[str, str]:
    """Names of the groups, ascending, that weights at these places are in: the first and last place, and the kind."""
    grouped: dict[str, str] = {}
    for _, members in itertools.groupby(range(len(names)), key=groups.__getitem__):
        here = list(members)
        label = _span(places[here[0]], places[here[-1]]) + kind
        grouped |= {names[i]: label for i in here}
    return grouped


def _span(first: str, last: str) -> str:
    if first == last:
        return first
    (stem, _, _), (other, _, end) = first.rpartition("."), last.rpartition(".")
    return f"{first}–{end}" if stem == other and end.isdigit() else f"{first} – {last}"


def _too_many(got: int, limit: int, names: Sequence[str]) -> ValueError:
    return ValueError(f"blocks must be at most {limit} for this model's {len(names)} modules, got {got}")
