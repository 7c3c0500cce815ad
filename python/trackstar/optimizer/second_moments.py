"""Second moments V of the gradients: what the optimizer knew, or an estimate of it."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trackstar.gradients.examples import check_vocabulary, encode_examples
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.passes import BATCH_TOKENS, check_model, has_loss, position_limit, vocabulary_size
from trackstar.gradients.spec import SketchSpec
from trackstar.gradients.tap import GradientTap
from trackstar.gradients.weights import Use, Weight
from trackstar.optimizer.correction import Correction, fit_rank
from trackstar.optimizer.files import check_state, open_state
from trackstar.optimizer.layouts import Moment, read_moment
from trackstar.optimizer.parameters import find_parameters
from trackstar.progress import console, track

ESTIMATE_DAMPING = 0.01
"""ε of an estimated V, relative to the root mean V of the module: a sample leaves some entries near zero."""

ADAM_EPS = 1e-8
"""ε of Adam where a state does not say: the default of torch and bitsandbytes."""


@dataclasses.dataclass(frozen=True)
class SecondMoments:
    """V of every attributed module.

    Attributes:
        source: "optimizer:adam", "optimizer:adam8bit", "optimizer:adafactor" or "estimate:<number of examples>".
        moments: {module: V}, nonnegative float32: full (O, I), or Adafactor's row and column means (O,), (I,).
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
        """V of a saved optimizer: Adam or AdamW (torch, bitsandbytes in 8 bits), Adafactor (torch, transformers).

        Adam's V is corrected for its bias, exp_avg_sq / (1 − β₂^step).

        Args:
            state: the optimizer's ``state_dict()``; or a file or folder that holds one, opened as
                ``optimizer_files.open_state`` says: what ``torch.save`` made (also of FSDP's full state), a
                safetensors file or index of shards with tensors "<parameter>.exp_avg_sq", a folder of
                ``torch.distributed.checkpoint``, or a checkpoint of transformers' Trainer or accelerate. Only the
                second moments of the wanted modules are read from it.
            model: the model that was trained. A state without names is matched by order: the model's own, or,
                where the optimizer has two groups, what is decayed first (matrices) and the rest second.
            spec: tells what V is wanted of; None is ``SketchSpec()``.

        Raises:
            FileNotFoundError: there is no such file, or none in the folder.
            ValueError: the file is damaged or no optimizer state, the state is of another model, or its second
                moments of a module are missing, of an unknown kind, or not finite and nonnegative.
        """
        state = open_state(Path(state)) if isinstance(state, str | os.PathLike) else check_state(state)
        chosen = (spec or SketchSpec()).weights(model)
        parameters = dict(model.named_parameters())
        named = {id(parameter): name for name, parameter in parameters.items()}
        # By identity: a tied parameter has one name. Of several parts of a parameter, each would be found anew.
        names = {
            name: named[id(weight.module.get_parameter(weight.field))] for name, weight in chosen.items()
        }
        kept = {}
        for name, (key, group) in find_parameters(state, model, list(dict.fromkeys(names.values()))).items():
            kept[name] = read_moment(name, tuple(parameters[name].shape), state["state"].get(key, {}), group)
        moments: dict[str, Moment] = {}
        eps: dict[str, float] = {}
        for name, weight in chosen.items():
            whole = kept[names[name]]
            moments[name] = _part_of(whole.unbiased(), weight)
            eps[name] = ADAM_EPS if whole.eps is None else whole.eps
        kinds = {moment.kind for moment in kept.values()}
        unsaid = {what for moment in kept.values() for what in moment.unsaid()}
        if "adam8bit" in kinds:
            kinds.discard("adam")  # the small parameters, which an 8-bit Adam keeps in 32 bits
        if unsaid:
            console().print(
                f"the optimizer state does not say {' and '.join(sorted(unsaid))}: bias correction needs step and "
                f"betas and is left out without them, eps is taken to be {ADAM_EPS}",
                soft_wrap=True,
            )
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
    if weight.kind in (
        "bias",
        "norm",
    ):  # vectors of several experts or heads, which the optimizer takes for a matrix
        return weight.view(torch.outer(row, col) / row.mean()).contiguous()
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
