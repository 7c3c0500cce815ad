"""Which parameter of a model each entry of a saved optimizer state belongs to."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from trackstar.optimizer.files import State
from trackstar.optimizer.layouts import misfit

Place = tuple[object, Mapping[str, Any]]
"""A parameter's key in the state, and its group."""

WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\."
)
"""What DataParallel, torch.compile, FSDP, activation checkpointing and PEFT put into parameter names."""

UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm(\.|$)|_norm(\.|$)")
"""Parameters that transformers' Trainer does not decay, besides those of nn.LayerNorm."""


def find_parameters(state: State, model: nn.Module, wanted: Sequence[str]) -> dict[str, Place]:
    """Where the state of each wanted parameter is.

    By name where the state has names, whatever wraps the modules in either and whatever stands before all of the
    state's names ("optimizer.state."); else by the order of ``model.named_parameters()``, checked by shape.

    Args:
        state: as ``open_state`` gives it.
        model: the model that was trained.
        wanted: names of ``model.named_parameters()``.

    Raises:
        ValueError: the state is of another model, or has nothing for a parameter.
    """
    groups = state["param_groups"]
    if all("param_names" in group for group in groups):
        places = {
            name: (key, group)
            for group in groups
            for name, key in zip(group["param_names"], group["params"], strict=True)
        }
    else:
        group_of = {key: group for group in groups for key in group["params"]}
        places = {key: (key, group_of.get(key, {})) for key in [*group_of, *state["state"]]}
        if not all(isinstance(key, str) for key in places):
            return _by_order(state, model, wanted)
    return _by_name(places, wanted)


def _by_name(places: Mapping[str, Place], wanted: Sequence[str]) -> dict[str, Place]:
    saved, asked = _unwrapped(places), _unwrapped(wanted)
    prefixes = Counter(head for name in saved for head, tail in _splits(name) if tail in asked)
    if not prefixes:
        raise ValueError(
            f"state must be of this model's optimizer: it has no parameter {wanted[0]!r}, "
            f"but {next(iter(places), 'none')!r}"
        )
    most = max(prefixes.values())
    likely = [prefix for prefix, count in prefixes.items() if count == most]
    if len(likely) > 1 and "" not in likely:
        raise ValueError(
            f"state must be of one model; it has {wanted[0]!r} after each of {', '.join(likely)}"
        )
    prefix = "" if "" in likely else likely[0]
    for bare, name in asked.items():
        if prefix + bare not in saved:
            raise ValueError(f"state must cover every captured module; it has no parameter for {name!r}")
    return {name: places[saved[prefix + bare]] for bare, name in asked.items()}


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    """{name without wrappers: name}."""
    bare: dict[str, str] = {}
    for name in names:
        other = bare.setdefault(WRAPPERS.sub("", name), name)
        if other != name:
            raise ValueError(f"parameters must differ in more than wrappers, got {other!r} and {name!r}")
    return bare


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """("", "a.b.c"), ("a.", "b.c"), ("a.b.", "c")."""
    starts = [0, *(i + 1 for i, character in enumerate(name) if character == ".")]
    return ((name[:start], name[start:]) for start in starts)


def _by_order(state: State, model: nn.Module, wanted: Sequence[str]) -> dict[str, Place]:
    groups = state["param_groups"]
    keys = [(key, group) for group in groups for key in group["params"]]
    complaint = ""
    for order in _orders(model, len(groups)):
        trouble = next(
            (
                trouble
                for (name, parameter), (key, _) in zip(order, keys, strict=False)
                if (trouble := misfit(name, tuple(parameter.shape), state["state"].get(key, {})))
            ),
            "" if len(order) == len(keys) else f"it has {len(keys)} parameters, the model {len(order)}",
        )
        if not trouble:
            places = {name: place for (name, _), place in zip(order, keys, strict=True)}
            break
        complaint = complaint or trouble
    else:
        raise ValueError(f"state must be of this model's optimizer: {complaint}")
    for name in wanted:
        if name not in places:
            raise ValueError(f"state must cover every captured module; it has no parameter for {name!r}")
    return {name: places[name] for name in wanted}


def _orders(model: nn.Module, groups: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Orders in which an optimizer may have been given the model's parameters: all, or the trained ones alone.

    Two groups are, in most training loops, what is decayed and what is not: matrices and vectors, or as
    transformers' Trainer tells them apart, which differs where vectors are no biases or norms.
    """
    every = list(model.named_parameters())
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    for given in (every, [(name, parameter) for name, parameter in every if parameter.requires_grad]):
        if groups == 2:
            yield sorted(given, key=lambda item: item[1].dim() < 2)
            yield sorted(
                given, key=lambda item: bool(UNDECAYED.search(item[0].lower())) or item[0].startswith(norms)
            )
        yield given
