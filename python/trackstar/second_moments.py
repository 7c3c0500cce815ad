"""Second moments V of the gradients: what the optimizer knew, or an estimate of it."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trackstar.correction import Correction, fit_rank
from trackstar.examples import check_vocabulary, encode_examples
from trackstar.lean import LeanPass
from trackstar.passes import BATCH_TOKENS, check_model, has_loss, position_limit, vocabulary_size
from trackstar.progress import track
from trackstar.spec import SketchSpec
from trackstar.tap import GradientTap
from trackstar.weights import Use, Weight

Moment = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Of one module: full (O, I), or Adafactor's row and column means (O,), (I,), with V_ij = row_i col_j / mean(row)."""

ESTIMATE_DAMPING = 0.01
"""ε of an estimated V, relative to the root mean V of the module: a sample leaves some entries near zero."""


@dataclasses.dataclass(frozen=True)
class SecondMoments:
    """V of every attributed module.

    Attributes:
        source: "optimizer:adam", "optimizer:adafactor" or "estimate:<number of examples>".
        moments: {module: V}, nonnegative float32.
        eps: ε of 1/(√V + ε) per module: the optimizer's own, or relative to V where it is an estimate.
    """

    source: str
    moments: dict[str, Moment]
    eps: dict[str, float]

    @staticmethod
    def from_optimizer(
        state: str | os.PathLike[str] | Mapping[str, Any],
        model: nn.Module,
        *,
        spec: SketchSpec | None = None,
    ) -> "SecondMoments":
        """V of a saved optimizer: torch Adam and AdamW, torch and transformers Adafactor.

        Adam's V is corrected for its bias, exp_avg_sq / (1 − β₂^step).

        Args:
            state: the optimizer's ``state_dict()``, a file that ``torch.save`` made of it ("optimizer.pt"), or a
                folder that holds one, such as a Trainer checkpoint.
            model: the model that was trained; its parameters in the optimizer's order, or, where the optimizer
                has two groups, the matrices first and vectors second (what a Trainer's weight decay makes of them).
            spec: tells what V is wanted of; None is ``SketchSpec()``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the state is of another model, or has no second moments for a module.
        """
        if isinstance(state, str | os.PathLike):
            state = _load_state(Path(state))
        if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
            raise ValueError('state must be an optimizer\'s state_dict with "state" and "param_groups"')
        places = _parameter_places(state, model)
        moments: dict[str, Moment] = {}
        eps: dict[str, float] = {}
        kinds = set()
        for name, weight in (spec or SketchSpec()).weights(model).items():
            if weight.parameter not in places:
                raise ValueError(
                    f"state must cover every captured module; it has no parameter for {weight.parameter!r}"
                )
            index, group = places[weight.parameter]
            kind, moment = _read_moment(weight.parameter, state["state"].get(index, {}), group)
            moment = _part_of(moment, weight)
            kinds.add(kind)
            moments[name], eps[name] = moment, _read_eps(kind, group)
        return SecondMoments("optimizer:" + "+".join(sorted(kinds)), moments, eps)

    @staticmethod
    def estimate(
        model: nn.Module,
        examples: Iterable[Mapping[str, Any]],
        *,
        tokenizer: Any = None,
        spec: SketchSpec | None = None,
    ) -> "SecondMoments":
        """V as the mean of squared per-example gradients over ``examples``, in float32.

        Holds one (O, I) matrix per module and one more for the gradient at hand.

        Args:
            model: a causal language model of transformers.
            examples: {"text": …} or {"input_ids": …}.
            tokenizer: the model's, for examples given as text.
            spec: tells what V is wanted of; None is ``SketchSpec()``.

        Raises:
            ValueError: there are no examples, or one is malformed, or none has a loss.
        """
        encoded = encode_examples(examples, tokenizer, position_limit(model))
        check_vocabulary(encoded, vocabulary_size(model), "examples")
        check_model(model)
        counted = [example for example in encoded if has_loss(example)]
        if not counted:
            raise ValueError("examples must hold at least one with a token to predict")
        chosen = (spec or SketchSpec()).weights(model)
        device = next(model.parameters()).device
        sums = {name: torch.zeros(weight.shape, device=device) for name, weight in chosen.items()}
        lean = LeanPass(model, [weight.module for weight in chosen.values()])
        tap = GradientTap(chosen, lambda use: _add_squares(sums[use.name], use))
        with track("second moments", len(counted)) as advance, lean, tap:
            for members in lean.batches([len(example) for example in counted], BATCH_TOKENS):
                batch = lean.arrange([counted[i] for i in members])
                tap.offsets, tap.shape = batch.offsets, batch.shape
                lean.run(batch)
                advance(len(members))
        moments: dict[str, Moment] = {name: (sums[name] / len(counted)).cpu() for name in chosen}
        eps = {name: ESTIMATE_DAMPING * v.mean().sqrt().item() for name, v in moments.items()}  # type: ignore[union-attr]
        return SecondMoments(f"estimate:{len(counted)}", moments, eps)

    def correction(self, kind: str, *, rank: int = 1) -> Correction:
        """V^(-1/2) in the form that the kernels take.

        Args:
            kind: "exact", 1/(√V + ε) entry by entry; or "rank", Σ_r u_r v_rᵀ fitted to it with weights V.
            rank: r of the rank form. Adafactor's factors are of rank 1 and are taken as they are, as are vectors.

        Raises:
            ValueError: ``kind`` is unknown, ``rank`` is out of range, or a module's V is zero throughout.
        """
        if kind not in ("exact", "rank"):
            raise ValueError(f'kind must be "exact" or "rank", got {kind!r}')
        smallest = min(
            (min(shape) for v in self.moments.values() if 1 not in (shape := _shape(v))), default=1
        )
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= smallest:
            raise ValueError(f"rank must be an int from 1 to {smallest} (the smallest module), got {rank!r}")
        scales, factors = {}, {}
        for name, moment in self.moments.items():
            eps = self.eps[name]
            if not all((part > 0).any() for part in (moment if isinstance(moment, tuple) else (moment,))):
                raise ValueError(
                    f"second moments of {name!r} must not be zero throughout: the module never learned"
                )
            if kind == "rank" and isinstance(moment, tuple):
                row, col = moment
                # Below ε² a factor would blow up rows that never received a gradient.
                u = (row / row.mean()).clamp_min(1e-12).rsqrt()
                factors[name] = u[None], (col.sqrt() + eps).reciprocal()[None]
                continue
            v = torch.outer(moment[0], moment[1]) / moment[0].mean() if isinstance(moment, tuple) else moment
            scale = (v.sqrt() + eps).reciprocal()
            if kind == "exact":
                scales[name] = scale
            elif scale.shape[1] == 1:
                factors[name] = scale.T.contiguous(), torch.ones(1, 1)
            else:
                factors[name] = fit_rank(v, scale, rank)
        return Correction(kind, self.source, scales, factors)


def _add_squares(total: torch.Tensor, use: Use) -> None:
    """Add the square of every example's gradient to ``total`` (O, I)."""
    for x, delta in use.each():
        if len(x) == 0:
            continue
        if use.weight.kind == "embedding":
            ids, places = x.unique(return_inverse=True)
            gradient = delta.new_zeros(len(ids), delta.shape[1], dtype=torch.float32)
            total[:, ids] += gradient.index_add_(0, places, delta.float()).square_().T
        else:
            gradient = delta.float().T @ x.float()
            part = total if use.rows is None else total[use.rows]
            if isinstance(use.rows, torch.Tensor):
                total[use.rows] = part.addcmul_(gradient, gradient)
            else:
                part.addcmul_(gradient, gradient)


def _part_of(moment: Moment, weight: Weight) -> Moment:
    """The second moment of a weight, of that of its parameter."""
    if not isinstance(moment, tuple):
        return weight.view(moment).contiguous()
    row, col = moment
    if weight.expert is not None:
        count = len(weight.module.get_parameter(weight.field))
        row, col = (factor.view(count, -1)[weight.expert] for factor in moment)
    if weight.transposed:
        row, col = col, row
    if weight.rows is not None:
        # V_ij = row_i col_j / mean(row), of whichever rows.
        part = row[weight.rows]
        row, col = part, col * (part.mean() / row.mean())
    return row, col


def _shape(moment: Moment) -> tuple[int, ...]:
    return (len(moment[0]), len(moment[1])) if isinstance(moment, tuple) else tuple(moment.shape)


def _load_state(path: Path) -> Any:
    file = path / "optimizer.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"optimizer state must be a file or a folder with optimizer.pt, found none at {file}"
        )
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _parameter_places(
    state: Mapping[str, Any], model: nn.Module
) -> dict[str, tuple[object, Mapping[str, Any]]]:
    """{parameter name: (its key in the state, its group)}.

    Raises:
        ValueError: neither of the known orders fits the shapes in the state.
    """
    groups = state["param_groups"]
    keys = [(key, group) for group in groups for key in group["params"]]
    if all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
        return dict(zip(names, keys, strict=True))
    parameters = list(model.named_parameters())
    matrices_first = sorted(parameters, key=lambda item: item[1].dim() < 2)
    trained = [item for item in parameters if item[1].requires_grad]
    complaint = ""
    for order in (matrices_first, parameters) if len(groups) == 2 else (parameters, trained):
        misfit = next(
            (m for item, key in zip(order, keys, strict=False) if (m := _misfit(*item, *key, state))), ""
        )
        if len(order) == len(keys) and not misfit:
            return {name: key for (name, _), key in zip(order, keys, strict=True)}
        complaint = complaint or misfit or f"it has {len(keys)} parameters, the model {len(order)}"
    raise ValueError(f"state must be of this model's optimizer: {complaint}")


def _misfit(
    name: str, parameter: torch.Tensor, key: object, group: Mapping[str, Any], state: Mapping[str, Any]
) -> str:
    """What shows that this state is not this parameter's, or ""."""
    entry = state["state"].get(key, {})
    for field in ("exp_avg_sq", "exp_avg"):
        moment = entry.get(field)
        if isinstance(moment, torch.Tensor) and moment.shape != parameter.shape:
            return (
                f"{field} of {name!r} has shape {tuple(moment.shape)}, the parameter {tuple(parameter.shape)}"
            )
    factors = _factors(entry)
    if factors is not None and tuple(map(len, factors)) != tuple(parameter.shape):
        return f"the factors of {name!r} have shapes {tuple(map(len, factors))}, the parameter {tuple(parameter.shape)}"
    return ""


def _factors(entry: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Adafactor's row and column means: transformers' exp_avg_sq_row/col or torch's row_var/col_var."""
    for row, col in (("exp_avg_sq_row", "exp_avg_sq_col"), ("row_var", "col_var")):
        if entry.get(row) is not None and entry.get(col) is not None:
            return entry[row].float().flatten(), entry[col].float().flatten()
    return None


def _read_moment(parameter: str, entry: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[str, Moment]:
    factors = _factors(entry)
    if factors is not None:
        return "adafactor", factors
    if entry.get("exp_avg_sq") is None:
        raise ValueError(f"state must hold second moments of every captured module; {parameter!r} has none")
    v = entry["exp_avg_sq"].float()
    if "betas" in group and "step" in entry:
        v = v / (1 - group["betas"][1] ** float(entry["step"]))
    return "adam", v


def _read_eps(kind: str, group: Mapping[str, Any]) -> float:
    if kind == "adam":
        return float(group["eps"])
    # Adafactor's eps regularizes the squared gradient before it is averaged, so V already contains it.
    return 0.0
