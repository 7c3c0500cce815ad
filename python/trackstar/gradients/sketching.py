"""From a weight's factored gradient to its part of a row: P_L (g ∘ V^(-1/2)) P_Rᵀ."""

from collections.abc import Iterable

import torch

from trackstar.gradients.spec import SketchSpec
from trackstar.gradients.weights import Use, Weight
from trackstar.optimizer.correction import Correction
from trackstar_kernels import project_gradients


class Sketch:
    """The projections of a weight, with its correction folded in.

    A matrix (O, I) is projected from both sides, to (q, p). A vector (O,) is projected from one side, to d = p q
    numbers: it is a matrix of one column, whose right projection is the number 1. An embedding (H, V) is projected as
    the matrix that it is, of which only the columns of an example's tokens are looked up.

    Raises:
        ValueError: the correction lacks or misfits the weight.
    """

    def __init__(self, weight: Weight, spec: SketchSpec, correction: Correction | None) -> None:
        fan_out, fan_in = weight.shape
        if weight.kind in ("bias", "norm"):
            self._left, self._right = spec.vector_projection(weight.name, fan_out), torch.ones(1, 1)
        else:
            self._left, self._right = spec.projections(weight.name, fan_in, fan_out)
        self._scale: torch.Tensor | None = None
        if correction is not None:
            self._left, self._right, self._scale = correction.fold(weight.name, self._left, self._right)

    def of(self, use: Use) -> torch.Tensor:
        """Part of each example's row, (B, d) float32."""
        x, delta, left, right, scale = self._factors(use)
        if x.dtype != delta.dtype or x.dtype == torch.float64:
            x, delta = x.float(), delta.float()
        projected = project_gradients(
            x, delta, left, right, scale=scale, offsets=use.offsets, check_finite=False
        )
        return projected.flatten(1)

    def along(self, use: Use, direction: torch.Tensor) -> torch.Tensor:
        """Product of each example's part of its row with a direction, without the rows: (B,) float32.

        ⟨A, P_L (δ xᵀ ∘ S) P_Rᵀ⟩ = δᵀ (P_Lᵀ A P_R ∘ S) x for each token: the direction goes back to where gradients are.

        Args:
            use: what a pass tells.
            direction: (d,) float32.
        """
        x, delta, left, right, scale = self._factors(use)
        x, delta = x.float(), delta.float()
        square = direction.to(delta.device).view(left.shape[-2], right.shape[-2])
        if scale is None:
            pairs = zip(left.view(-1, *left.shape[-2:]), right.view(-1, *right.shape[-2:]), strict=True)
            terms = delta.new_zeros(delta.shape[:-1])
            for by_output, by_input in pairs:
                terms += (delta @ by_output.T @ square).mul_(x @ by_input.T).sum(-1)
        else:
            terms = (delta @ (left.T @ square @ right).mul_(scale)).mul_(x).sum(-1)
        if use.offsets is None:
            return terms.sum(1)
        owners = torch.repeat_interleave(torch.arange(use.examples), use.offsets.diff())
        return terms.new_zeros(use.examples).index_add_(0, owners.to(terms.device), terms)

    def _factors(
        self, use: Use
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(x, δ, left, right, scale), as ``project_gradients`` takes them."""
        self._move(use.output_grads.device)
        x, delta, left, right, scale = use.activations, use.output_grads, self._left, self._right, self._scale
        if use.weight.kind == "embedding":
            if scale is not None:
                delta, scale = delta.float() * scale[:, x].movedim(0, -1), None
            x, right = _look_up(right, x)
        elif use.rows is not None:
            left, scale = left[..., use.rows], None if scale is None else scale[use.rows]
        return x, delta, left, right, scale

    def _move(self, device: torch.device) -> None:
        """To where the weight runs, once and for all."""
        if self._left.device != device:
            self._left, self._right = self._left.to(device), self._right.to(device)
            self._scale = None if self._scale is None else self._scale.to(device)


def sketch_bytes(weights: Iterable[Weight], spec: SketchSpec, rank: int) -> int:
    """Memory of the projections of these weights, with a correction of this rank (1 for none and exact) folded in."""
    total = 0
    for weight in weights:
        fan_out, fan_in = weight.shape
        vector = weight.kind in ("bias", "norm")
        total += 4 * rank * (spec.block_size * fan_out if vector else spec.sketch * (fan_out + fan_in))
    return total


def _look_up(right: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """P_R times one-hot inputs, and what is left to project that with: (…, p) and (p, p), or (…, r p) and (r, p, r p).

    Args:
        right: (p, V) or (r, p, V).
        ids: int64, where the ones are.
    """
    looked_up = right.flatten(0, -2)[:, ids].movedim(0, -1).contiguous()
    width = looked_up.shape[-1]
    return looked_up, torch.eye(width, device=right.device).view(*right.shape[:-1], width)
