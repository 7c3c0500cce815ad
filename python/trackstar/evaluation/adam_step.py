"""One more step of a saved Adam or AdamW, in closed form: the saved moments are read and never changed."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trackstar.optimizer.files import check_state, open_state, value_of
from trackstar.optimizer.parameters import find_parameters
from trackstar.storage import fingerprint

PIECE = 131_072
"""Entries of a parameter that are stepped at a time, so that what is computed of them stays in the cache."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """What Adam keeps of one parameter, and the options of its group.

    Attributes:
        first: E[g], in the parameter's shape.
        second: E[g²], likewise.
        step: updates made.
        lr: learning rate.
        betas: decay rates of the two.
        eps: ε of 1/(√V + ε).
        weight_decay: share of the weights taken off in a step, times lr; or, of Adam, added to the gradient.
        decoupled: True for AdamW.
    """

    first: torch.Tensor
    second: torch.Tensor
    step: float
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool


class AdamStep:
    """The next step of a saved Adam or AdamW, from one gradient.

        m = β₁ m + (1 − β₁) g,  v = β₂ v + (1 − β₂) g²,
        θ ← (1 − lr·decay) θ − lr · m / (1 − β₁^t) / (√(v / (1 − β₂^t)) + ε)

    with the operations of torch.optim.AdamW in their order.

    Args:
        model: that was trained; its parameters that require gradients are stepped.
        state: the optimizer's ``state_dict()``, or a file or folder that holds one, as ``SecondMoments.from_optimizer``
            takes it.
        lr: learning rate; None is each group's own, as saved.
        momentum: False forgets m, as with β₁ = 0: the step is along the gradient alone, over √v.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the state is another model's or not Adam's, the learning rate is not above zero, or no parameter
            requires gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        state: str | os.PathLike[str] | Mapping[str, Any],
        *,
        lr: float | None = None,
        momentum: bool = True,
    ) -> None:
        opened = open_state(Path(state)) if isinstance(state, str | os.PathLike) else check_state(state)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("model must have parameters that require gradients, it has none")
        places = find_parameters(opened, model, list(self._parameters))
        self._moments = {
            name: _read(name, self._parameters[name], opened["state"].get(key, {}), group, lr)
            for name, (key, group) in places.items()
        }
        if not momentum:
            self._moments = {
                name: dataclasses.replace(moments, betas=(0.0, moments.betas[1]))
                for name, moments in self._moments.items()
            }

    def settings(self) -> dict[str, Any]:
        """What the step depends on: each different value of an option once, and a hash of the moments."""
        every = self._moments.values()
        options = ("lr", "weight_decay", "betas", "eps", "decoupled", "step")
        # Lists throughout, as JSON gives them back.
        values: dict[str, Any] = {
            option: [
                list(v) if isinstance(v, tuple) else v for v in sorted({getattr(m, option) for m in every})
            ]
            for option in options
        }
        named = [(name, moment) for name, m in self._moments.items() for moment in (m.first, m.second)]
        return values | {"moments": fingerprint.of_tensors(named)}

    @torch.no_grad()
    def take(self) -> None:
        """Step the parameters by their gradients; as in torch, a parameter without one stays."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                moments = self._moments[name]
                for piece in _pieces(parameter, parameter.grad, moments.first, moments.second):
                    _step(moments, *piece)


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of tensors of one shape that make them up, of about ``PIECE`` entries each."""
    parts = [torch.atleast_1d(tensor) for tensor in tensors]
    rows, entries = len(parts[0]), parts[0].numel()
    yield from zip(*(part.split(max(1, PIECE * rows // entries)) for part in parts), strict=True)


def _step(
    moments: Moments,
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
) -> None:
    if moments.weight_decay and moments.decoupled:
        parameter.mul_(1 - moments.lr * moments.weight_decay)
    elif moments.weight_decay:
        gradient = gradient.add(parameter, alpha=moments.weight_decay)
    beta1, beta2 = moments.betas
    t = moments.step + 1
    first = first.lerp(gradient, 1 - beta1)
    denominator = second.mul(beta2).addcmul_(gradient, gradient, value=1 - beta2).sqrt_()
    denominator.div_((1 - beta2**t) ** 0.5).add_(moments.eps)
    parameter.addcdiv_(first, denominator, value=-moments.lr / (1 - beta1**t))


def _read(
    name: str, parameter: nn.Parameter, entry: Mapping[str, Any], group: Mapping[str, Any], lr: float | None
) -> Moments:
    if "exp_avg" not in entry or "exp_avg_sq" not in entry:
        raise ValueError(
            f"optimizer_state must be Adam's, with exp_avg and exp_avg_sq; of {name!r} it holds "
            f"{', '.join(map(str, entry)) or 'nothing'}"
        )
    step = value_of(entry.get("step", group.get("step")))
    missing = [option for option in ("betas", "eps") if option not in group]
    missing += ["step"] * (step is None) + ["lr"] * (lr is None and "lr" not in group)
    if missing:
        raise ValueError(f"optimizer_state must say {' and '.join(missing)}, as a state_dict() of Adam does")
    for option in ("amsgrad", "maximize"):
        if group.get(option):
            raise ValueError(f"optimizer_state must be of Adam or AdamW without {option}")
    rate = float(value_of(group["lr"]) if lr is None else lr)
    if not 0 < rate < float("inf"):
        raise ValueError(f"lr must be above zero, got {rate}: give the rate of the step that is to be taken")
    first, second = (
        value_of(entry[field]).to(parameter.device, parameter.dtype) for field in ("exp_avg", "exp_avg_sq")
    )
    for field, moment in (("exp_avg", first), ("exp_avg_sq", second)):
        if moment.shape != parameter.shape:
            raise ValueError(
                f"optimizer_state must be of this model's optimizer: {field} of {name!r} has shape "
                f"{tuple(moment.shape)}, the parameter {tuple(parameter.shape)}"
            )
    beta1, beta2 = map(float, group["betas"])
    return Moments(
        first,
        second,
        float(step),
        rate,
        (beta1, beta2),
        float(group["eps"]),
        float(group.get("weight_decay", 0.0)),
        # Where a state does not say (torch before 2.8), it is taken to be AdamW's.
        bool(group.get("decoupled_weight_decay", True)),
    )
