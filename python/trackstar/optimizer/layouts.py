"""What the fields of one parameter's optimizer state say about its second moments."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trackstar.optimizer.files import QUANTIZED, value_of

Shape = tuple[int, ...]

Moment = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Full, in the shape of the weight; or Adafactor's row and column means, with V_ij = row_i col_j / mean(row)."""

BLOCK_SIZES = (256, 2048)
"""Consecutive elements that share an absmax in bitsandbytes' 8-bit states: of today, and of older versions."""


@dataclasses.dataclass(frozen=True)
class KeptMoment:
    """The second moments of one parameter as its optimizer kept them.

    Attributes:
        parameter: its name.
        kind: "adam", "adam8bit" or "adafactor".
        moment: V or its factors, float32, finite and nonnegative.
        step: updates made. Here and below, None where the state does not say.
        betas: decay rates.
        eps: ε of 1/(√V + ε).
    """

    parameter: str
    kind: str
    moment: Moment
    step: float | None
    betas: tuple[float, ...] | None
    eps: float | None

    def unbiased(self) -> Moment:
        """Adam's V / (1 − β₂^step), as it is where step or betas are unknown; Adafactor's factors as they are.

        Raises:
            ValueError: no update was made.
        """
        if isinstance(self.moment, tuple) or self.step is None or self.betas is None:
            return self.moment
        if self.step < 1:
            raise ValueError(
                f"step of {self.parameter!r} must be at least 1, got {self.step}: it never learned"
            )
        return self.moment / (1 - self.betas[1] ** self.step)

    def unsaid(self) -> list[str]:
        """What :meth:`unbiased` and 1/(√V + ε) would need and the state does not say."""
        needed = ("eps",) if self.kind == "adafactor" else ("step", "betas", "eps")
        return [field for field in needed if getattr(self, field) is None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to keep second moments.

    Attributes:
        kind: of optimizer.
        fields: that the parameter's state has.
        shapes: given the parameter's shape, those that each field may have.
        read: the fields' values → V or its factors, float32.
        without: fields that would give these another meaning.
    """

    kind: str
    fields: tuple[str, ...]
    shapes: Callable[[Shape], tuple[list[Shape], ...]]
    read: Callable[..., Moment]
    without: tuple[str, ...] = ()


def read_moment(
    parameter: str, shape: Shape, entry: Mapping[str, Any], group: Mapping[str, Any]
) -> KeptMoment:
    """The second moments of one parameter; nothing else of its state is read.

    Args:
        parameter: its name, for errors.
        shape: of the parameter.
        entry: its state.
        group: the options of its group.

    Raises:
        ValueError: the state has no second moments, they are of another shape, or not finite and nonnegative.
    """
    layout = _layout_of(entry)
    if layout is None:
        held = ", ".join(_flat(entry)) or "nothing"
        raise ValueError(
            f"state must hold second moments of every captured module; {parameter!r} has none (it holds {held})"
        )
    if trouble := misfit(parameter, shape, entry):
        raise ValueError(f"state must be of this model's optimizer: {trouble}")
    moment = layout.read(*(value_of(_flat(entry)[field]) for field in layout.fields))
    for part in moment if isinstance(moment, tuple) else (moment,):
        low, high = part.aminmax()
        if not (low >= 0 and high < math.inf):  # a NaN makes both NaN
            raise ValueError(
                f"second moments of {parameter!r} must be finite and nonnegative; of {part.numel()} numbers "
                f"{int((~part.isfinite()).sum())} are NaN or infinite and {int((part < 0).sum())} negative"
            )
    step = value_of(entry.get("step", group.get("step")))
    betas = group.get("betas")
    # transformers' Adafactor keeps V of a vector as Adam does; its decay rate tells.
    kind = "adafactor" if "decay_rate" in group else layout.kind
    # Adafactor's two regularize the squared gradient before it is averaged, so V already contains them.
    eps = 0.0 if kind == "adafactor" else group.get("eps")
    return KeptMoment(
        parameter,
        kind,
        moment,
        None if step is None else float(step),
        None if betas is None else tuple(map(float, betas)),
        None if eps is None else float(eps),
    )


def misfit(parameter: str, shape: Shape, entry: Mapping[str, Any]) -> str:
    """What shows that this state is not this parameter's, or ""; reads shapes alone."""
    layout = _layout_of(entry)
    for field, shapes in zip(layout.fields, layout.shapes(shape), strict=True) if layout else ():
        got = tuple(_flat(entry)[field].shape)
        if got not in shapes:
            return f"{field} of {parameter!r} has shape {got}, the parameter {shape}"
    return ""


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**entry, **entry.get(QUANTIZED, {})}


def _layout_of(entry: Mapping[str, Any]) -> Layout | None:
    """The layout whose fields are all there, None where there is no second moment known."""
    fields = {field for field, value in _flat(entry).items() if value is not None}
    return next(
        (each for each in LAYOUTS if fields.issuperset(each.fields) and fields.isdisjoint(each.without)), None
    )


def _read_full(v: torch.Tensor) -> torch.Tensor:
    return v.float()


def _read_factors(row: torch.Tensor, col: torch.Tensor) -> Moment:
    return row.float().flatten(), col.float().flatten()


def _read_blockwise(codes: torch.Tensor, values: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """V_i = values[codes_i] · absmax[block of i], blocks of the flattened parameter."""
    n = codes.numel()
    block = next(size for size in BLOCK_SIZES if math.ceil(n / size) == len(absmax))
    v = values.float()[codes.flatten().int()]
    return v.mul_(absmax.float().repeat_interleave(block)[:n]).view(codes.shape)


def _blockwise_shapes(shape: Shape) -> tuple[list[Shape], ...]:
    return [shape], [(256,)], [(math.ceil(math.prod(shape) / size),) for size in BLOCK_SIZES]


LAYOUTS = (
    # torch; transformers' Adafactor where a parameter is no matrix
    Layout("adam", ("exp_avg_sq",), lambda s: ([s],), _read_full),
    # bitsandbytes: matrices, then what it keeps in 32 bits
    Layout("adam8bit", ("state2", "qmap2", "absmax2"), _blockwise_shapes, _read_blockwise),
    Layout("adam", ("state2",), lambda s: ([s],), _read_full, without=("qmap2",)),
    # Adafactor: torch where a parameter is no matrix, transformers, torch
    Layout("adafactor", ("variance",), lambda s: ([s],), _read_full),
    Layout(
        "adafactor",
        ("exp_avg_sq_row", "exp_avg_sq_col"),
        lambda s: ([s[:-1]], [s[:-2] + s[-1:]]),
        _read_factors,
    ),
    Layout(
        "adafactor",
        ("row_var", "col_var"),
        lambda s: ([(*s[:-1], 1)], [(*s[:-2], 1, *s[-1:])]),
        _read_factors,
    ),
)
"""How optimizers keep second moments; of each state, the first that fits."""
