"""Ops of torch's dispatcher, for torch.compile and fake tensors.

``torch.library.custom_op`` would do, but the first call of what it makes imports torch's compiler: seconds and a
hundred megabytes in every process that scores a store.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("trackstar", "FRAGMENT")


def custom_op(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function, by its type hints, the op ``trackstar::<name>``, which mutates none of its arguments."""

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.trackstar, name).default

    return define
