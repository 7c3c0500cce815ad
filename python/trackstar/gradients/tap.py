"""Seeing each weight's gradient, factored, while somebody's training loop runs."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from trackstar.gradients.follow import Follower
from trackstar.gradients.origins import Layout
from trackstar.gradients.weights import Use, Weight


class _StartGraph(torch.autograd.Function):
    """Identity that makes its output differentiable although nothing before it is."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        return None, None


class GradientTap:
    """Calls ``on_gradient(use)`` for each use of each weight that the loss depends on.

    A module's first dimension is the batch, the last its features, and all between are tokens; or one dimension
    holds the tokens of all examples, (B T, features). The weights themselves need no gradient: where nothing upstream
    requires one, the graph starts at the module's output, so that neither a weight gradient nor the gradient of the
    model's input is ever computed for the tap's sake.

    Attributes:
        offsets: None, or for packed passes the (B + 1,) int64 positions where examples begin along the second
            dimension, and the end. Set it before the forward pass.
        shape: (B, T) of the passes; None to tell it from the first activation of three dimensions.
    """

    def __init__(
        self,
        weights: Mapping[str, Weight],
        on_gradient: Callable[[Use], None],
        on_forward: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.offsets: torch.Tensor | None = None
        self.shape: tuple[int, int] | None = None
        self._seen_shape: tuple[int, int] | None = None
        self._layout = Layout()
        self._on_gradient = on_gradient
        self._on_forward = on_forward
        self._hooked: dict[nn.Module, list[Weight]] = {}
        for weight in weights.values():
            if not weight.followed:
                self._hooked.setdefault(weight.module, []).append(weight)
        followed = [weight for weight in weights.values() if weight.followed]
        self._follower = Follower(followed, self) if followed else None
        self._experts: dict[nn.Module, list[str]] = {}
        for weight in followed:
            if weight.expert is not None:
                self._experts.setdefault(weight.module, []).append(weight.name)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "GradientTap":
        self._seen_shape = None
        for module, weights in self._hooked.items():
            see = {"embedding": self._see_table, "norm": self._see_norm}.get(
                weights[0].kind, self._see_linear
            )
            hook = partial(self._after_forward, see, weights)
            self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        if self._follower is not None:
            for owner, names in self._experts.items():
                self._hooks.append(owner.register_forward_pre_hook(partial(self._before_experts, names)))
            self._follower.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._follower is not None:
            self._follower.__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def layout(self) -> Layout:
        """Where the examples of the pass under way are."""
        shape = self._seen_shape if self.shape is None else self.shape
        if self._layout.offsets is not self.offsets or (self.offsets is None and self._layout.shape != shape):
            packed = None if self.offsets is None else (1, int(self.offsets[-1]))
            self._layout = Layout(self.offsets, shape if packed is None else packed)
        return self._layout

    def start(self, output: torch.Tensor, names: Iterable[str]) -> torch.Tensor:
        """The weights of these names made this output; returns it, differentiable."""
        for name in names:
            self._on_forward(name)
        if output.requires_grad:
            return output
        return _StartGraph.apply(torch.zeros((), device=output.device, requires_grad=True), output)

    def use(self, use: Use) -> None:
        """Pass on what a pass told of a weight's gradient."""
        self._on_gradient(use)

    def use_table(
        self, weight: Weight, ids: torch.Tensor, padding: int | None, layout: Layout, grad: torch.Tensor
    ) -> None:
        """Pass on the gradient by the output of an embedding."""
        if padding is not None:
            grad = grad.masked_fill((ids == padding)[..., None], 0.0)
        output_grads, offsets = self._arrange(weight.name, grad, layout)
        positions, _ = self._arrange(weight.name, ids[..., None], layout)
        self._on_gradient(Use(weight, positions[..., 0], output_grads, offsets))

    def unfollowed(self, name: str) -> str | None:
        """Name of a function that read this weight, of which a gradient is not known; None where there was none."""
        return None if self._follower is None else self._follower.unfollowed.get(name)

    def _before_experts(self, names: list[str], module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            for name in names:
                self._on_forward(name)

    def _after_forward(
        self,
        see: Callable[..., Callable[[torch.Tensor], None]],
        weights: list[Weight],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        name = weights[0].name
        if not isinstance(output, torch.Tensor):
            raise RuntimeError(f"module {name!r} must return a tensor, got {type(output).__name__}")
        given = args[0] if args else next(iter(kwargs.values()))
        if given.dim() < 2 and weights[0].kind != "embedding":
            raise ValueError(
                f"module {name!r} must be called on a batch (B, …, features), got {tuple(given.shape)}"
            )
        if given.dim() >= 3 and self.shape is None:
            self._seen_shape = (given.shape[0], given.shape[1])
        started = self.start(output, [weight.name for weight in weights])
        given, version = given.detach(), given._version
        tell = see(weights, module, given, args, kwargs, self.layout())

        def after_backward(grad: torch.Tensor) -> None:
            if given._version != version:
                raise RuntimeError(
                    f"the input of module {name!r} was overwritten in place before the backward pass"
                )
            with torch.no_grad():
                tell(grad)

        started.register_hook(after_backward)
        return None if started is output else started

    def _see_linear(
        self,
        weights: list[Weight],
        module: nn.Module,
        given: torch.Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layout: Layout,
    ) -> Callable[[torch.Tensor], None]:
        def tell(grad: torch.Tensor) -> None:
            x, offsets = self._arrange(weights[0].name, given, layout)
            delta, _ = self._arrange(weights[0].name, grad, layout)
            for weight in weights:
                if weight.kind == "bias":
                    self._on_gradient(Use.of_vector(weight, delta, offsets))
                else:
                    part = delta if weight.rows is None else delta[..., weight.rows]
                    self._on_gradient(Use(weight, x, part, offsets))

        return tell

    def _see_table(
        self,
        weights: list[Weight],
        module: nn.Embedding,
        given: torch.Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layout: Layout,
    ) -> Callable[[torch.Tensor], None]:
        def tell(grad: torch.Tensor) -> None:
            for weight in weights:
                self.use_table(weight, given, module.padding_idx, layout, grad)

        return tell

    def _see_norm(
        self,
        weights: list[Weight],
        module: nn.Module,
        given: torch.Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layout: Layout,
    ) -> Callable[[torch.Tensor], None]:
        inputs = [_float(value) for value in args], {key: _float(value) for key, value in kwargs.items()}

        def tell(grad: torch.Tensor) -> None:
            for weight in weights:
                products = grad.float() * _slope(module, weight, *inputs)
                if layout.offsets is not None:
                    products = _tokens_second(products, int(layout.offsets[-1]))
                self._on_gradient(Use.of_vector(weight, *self._arrange(weight.name, products, layout)))

        return tell

    def _arrange(
        self, name: str, tensor: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, features) and None, or of packed examples (n, features) and where each begins in it."""
        if layout.offsets is not None:
            flat, tokens = tensor.flatten(0, -2), int(layout.offsets[-1])
            each, rest = divmod(len(flat), max(tokens, 1))
            if rest or (each != 1 and tensor.shape[:2] != (1, tokens)):
                raise RuntimeError(
                    f"module {name!r} must see the {tokens} tokens of offsets, got {len(flat)}"
                )
            return flat, layout.offsets * each
        batch = len(tensor)
        if layout.shape is not None:
            examples, tokens = layout.shape
            if tensor.dim() == 2 and batch != examples and batch == examples * tokens:
                batch = examples
            if self.shape is not None and batch != examples:
                raise RuntimeError(f"module {name!r} must see a batch of {examples} examples, it saw {batch}")
        return tensor.reshape(batch, -1, tensor.shape[-1]), None


def _slope(module: nn.Module, weight: Weight, args: list[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """∂y/∂w of a norm's output y by one of its vectors w, entry by entry, (…, features) float32: y is linear in w."""

    def output(value: float) -> torch.Tensor:
        vectors = {
            field: torch.full_like(p, value if field == weight.field else 0.0, dtype=torch.float32)
            for field, p in module.named_parameters(recurse=False)
        }
        return torch.func.functional_call(module, vectors, tuple(args), kwargs)

    slope = output(1.0) - output(0.0)
    shape = module.get_parameter(weight.field).shape
    if slope.shape[-len(shape) :] != shape:
        raise RuntimeError(
            f"{weight.name!r} of shape {tuple(shape)} must lie along the last dimensions of its module's output, "
            f"got {tuple(slope.shape)}"
        )
    return slope.flatten(-len(shape))


def _tokens_second(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    """The tensor with its dimension of all packed tokens as second: norms of heads have theirs before it."""
    places = [i for i, size in enumerate(tensor.shape[:-1]) if size == tokens]
    return tensor if 1 in places or not places else tensor.movedim(places[0], 1)


def _float(value: Any) -> Any:
    return value.detach().float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
