"""Second moments V of the gradients: what the optimizer knew, or an estimate of it."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trackstar.correction import Correction, fit_rank
from trackstar.examples import check_vocabulary, encode_examples
from trackstar.lean import LeanPass
from trackstar.modules import is_conv1d, select_modules
from trackstar.optimizer_files import check_state, open_state
from trackstar.optimizer_layouts import Moment, read_moment
from trackstar.optimizer_parameters import find_parameters
from trackstar.passes import BATCH_TOKENS, check_model, has_loss, position_limit, vocabulary_size
from trackstar.progress import console, track
from trackstar.tap import GradientTap

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
        modules: Sequence[str] | None = None,
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
            modules: shell patterns of the modules wanted; None as in ``SketchSpec``.

        Raises:
            FileNotFoundError: there is no such file, or none in the folder.
            ValueError: the file is damaged or no optimizer state, the state is of another model, or its second
                moments of a module are missing, of an unknown kind, or not finite and nonnegative.
        """
        state = open_state(Path(state)) if isinstance(state, str | os.PathLike) else check_state(state)
        chosen = select_modules(model, modules)
        parameters = dict(model.named_parameters())
        named = {id(parameter): name for name, parameter in parameters.items()}
        weights = {name: named[id(module.weight)] for name, module in chosen.items()}
        places = find_parameters(state, model, list(weights.values()))
        moments: dict[str, Moment] = {}
        eps: dict[str, float] = {}
        kinds, unsaid = set(), set()
        for name, weight in weights.items():
            key, group = places[weight]
            kept = read_moment(weight, tuple(parameters[weight].shape), state["state"].get(key, {}), group)
            moment = kept.unbiased()
            if is_conv1d(chosen[name]):
                moment = (moment[1], moment[0]) if isinstance(moment, tuple) else moment.T.contiguous()
            moments[name], eps[name] = moment, ADAM_EPS if kept.eps is None else kept.eps
            kinds.add(kept.kind)
            unsaid.update(kept.unsaid())
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
        modules: Sequence[str] | None = None,
    ) -> "SecondMoments":
        """V as the mean of squared per-example gradients over ``examples``, in float32.

        Holds one (O, I) matrix per module and one more for the gradient at hand.

        Raises:
            ValueError: there are no examples, or one is malformed, or none has a loss.
        """
        encoded = encode_examples(examples, tokenizer, position_limit(model))
        check_vocabulary(encoded, vocabulary_size(model), "examples")
        check_model(model)
        counted = [example for example in encoded if has_loss(example)]
        if not counted:
            raise ValueError("examples must hold at least one with a token to predict")
        chosen = select_modules(model, modules)
        sums: dict[str, torch.Tensor] = {}

        def add_squares(name: str, activations: torch.Tensor, output_grads: torch.Tensor) -> None:
            total = sums.get(name)
            if total is None:
                total = sums[name] = torch.zeros(
                    output_grads.shape[2], activations.shape[2], device=activations.device
                )
            if batch.offsets is None:
                examples_of = zip(activations, output_grads, strict=True)
            else:
                examples_of = zip(
                    *(t[0].split(batch.lengths) for t in (activations, output_grads)), strict=True
                )
            for x, delta in examples_of:
                gradient = delta.float().T @ x.float()
                total.addcmul_(gradient, gradient)

        lean = LeanPass(model, chosen.values())
        with track("second moments", len(counted)) as advance, lean, GradientTap(chosen, add_squares):
            for members in lean.batches([len(example) for example in counted], BATCH_TOKENS):
                batch = lean.arrange([counted[i] for i in members])
                lean.run(batch)
                advance(len(members))
        moments: dict[str, Moment] = {name: (sums[name] / len(counted)).cpu() for name in chosen}
        eps = {name: ESTIMATE_DAMPING * v.mean().sqrt().item() for name, v in moments.items()}  # type: ignore[union-attr]
        return SecondMoments(f"estimate:{len(counted)}", moments, eps)

    def correction(self, kind: str, *, rank: int = 1) -> Correction:
        """V^(-1/2) in the form that the kernels take.

        Args:
            kind: "exact", 1/(√V + ε) entry by entry; or "rank", Σ_r u_r v_rᵀ fitted to it with weights V.
            rank: r of the rank form. Adafactor's factors are of rank 1 and are taken as they are.

        Raises:
            ValueError: ``kind`` is unknown, ``rank`` is out of range, or a module's V is zero throughout.
        """
        if kind not in ("exact", "rank"):
            raise ValueError(f'kind must be "exact" or "rank", got {kind!r}')
        smallest = min(min(_shape(v)) for v in self.moments.values())
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
            else:
                factors[name] = fit_rank(v, scale, rank)
        return Correction(kind, self.source, scales, factors)


def _shape(moment: Moment) -> tuple[int, ...]:
    return (len(moment[0]), len(moment[1])) if isinstance(moment, tuple) else tuple(moment.shape)
