"""Seeing each module's input and output gradient while somebody's training loop runs."""

from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

OnGradient = Callable[[str, torch.Tensor, torch.Tensor], None]


class _StartGraph(torch.autograd.Function):
    """Identity that makes its output differentiable although nothing before it is."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        return None, None


class GradientTap:
    """Calls ``on_gradient(name, activations, output_grads)`` for each call of each module that the loss depends on.

    Activations are (B, T, I) and output gradients (B, T, O): a module's first dimension is the batch, the last
    its features, and all between are tokens. The weights themselves need no gradient: where nothing upstream
    requires one, the graph starts at the module's output, so that neither a weight gradient nor the gradient
    of the model's input is ever computed for the tap's sake.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        on_gradient: OnGradient,
        on_forward: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._modules = modules
        self._on_gradient = on_gradient
        self._on_forward = on_forward
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "GradientTap":
        for name, module in self._modules.items():
            hook = partial(self._after_forward, name)
            self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _after_forward(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        self._on_forward(name)
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        if x.dim() < 2:
            raise ValueError(
                f"module {name!r} must be called on a batch (B, …, features), got {tuple(x.shape)}"
            )
        started = None
        if not output.requires_grad:
            anchor = torch.zeros((), device=output.device, requires_grad=True)
            output = started = _StartGraph.apply(anchor, output)
        output.register_hook(partial(self._after_backward, name, x, x._version))
        return started

    def _after_backward(self, name: str, x: torch.Tensor, version: int, grad: torch.Tensor) -> None:
        if x._version != version:
            raise RuntimeError(
                f"the input of module {name!r} was overwritten in place before the backward pass"
            )
        batch = x.shape[0]
        with torch.no_grad():
            self._on_gradient(
                name, x.reshape(batch, -1, x.shape[-1]), grad.reshape(batch, -1, grad.shape[-1])
            )
