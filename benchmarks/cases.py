"""The cases of project_gradients: form × shape → arguments, arithmetic, bytes, and the obvious torch code."""

import dataclasses
import itertools
from collections.abc import Callable

import torch

from trackstar_kernels import projection_matrix

FORMS = ("none", "rank-1", "rank-4", "exact", "exact countsketch")
BATCH = 8
SHAPES = ((768, 768), (2048, 768), (768, 2048), (576, 1536), (192, 576))  # O, I
TOKENS = (128, 512)
SKETCHES = (16, 64)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A batch at one linear layer: X (B, T, I), Δ (B, T, O), and an exact correction (O, I) in float32."""

    out_features: int
    in_features: int
    tokens: int
    dtype: torch.dtype
    device: str

    def tensors(self) -> dict[str, torch.Tensor]:
        """Random arguments of project_gradients that do not depend on the form."""
        generator = torch.Generator(self.device).manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, device=self.device, generator=generator)  # noqa: E731
        return {
            "activations": normal(BATCH, self.tokens, self.in_features).to(self.dtype),
            "output_grads": normal(BATCH, self.tokens, self.out_features).to(self.dtype),
            "scale": normal(self.out_features, self.in_features).exp(),
        }


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of project_gradients on a layer's batch, p = q = sketch."""

    layer: Layer
    form: str
    sketch: int

    @property
    def exact(self) -> bool:
        return self.form.startswith("exact")

    @property
    def rank(self) -> int:
        return int(self.form.removeprefix("rank-")) if self.form.startswith("rank") else 1

    def arguments(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Everything that project_gradients is given."""
        left, right = (
            torch.stack([self._projection(side, r) for r in range(self.rank)]) for side in ("left", "right")
        )
        if self.rank == 1:
            left, right = left[0], right[0]
        given = {name: tensors[name] for name in ("activations", "output_grads")}
        return given | {"left": left, "right": right} | ({"scale": tensors["scale"]} if self.exact else {})

    def _projection(self, side: str, r: int) -> torch.Tensor:
        sparse = self.form == "exact countsketch" and side == "left"
        return projection_matrix(
            self.sketch,
            self.layer.out_features if side == "left" else self.layer.in_features,
            seed=0,
            stream=2 * r + (side == "left"),
            kind="countsketch" if sparse else "rademacher",
            dtype=self.layer.dtype,
            device=self.layer.device,
        )

    @property
    def flops(self) -> int:
        """Arithmetic that the form cannot do without: its products, contracted in the cheaper order."""
        O, I, T, p = self.layer.out_features, self.layer.in_features, self.layer.tokens, self.sketch
        if not self.exact:
            return 2 * BATCH * T * p * self.rank * (O + I + p)
        right_first = 2 * O * I * p + 2 * O * p * p
        left_first = (O * I if self.form == "exact countsketch" else 2 * O * I * p) + 2 * p * I * p
        return BATCH * (2 * T * O * I + O * I + min(left_first, right_first))

    def bytes(self, arguments: dict[str, torch.Tensor]) -> int:
        """Memory traffic that it cannot do without: arguments read once, the result written."""
        return sum(tensor.nbytes for tensor in arguments.values()) + 4 * BATCH * self.sketch**2

    def obvious(self, arguments: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
        """What one would write in torch, with every buffer there already."""
        X, delta, left, right = (arguments[name] for name in ("activations", "output_grads", "left", "right"))
        O, I, p = self.layer.out_features, self.layer.in_features, self.sketch
        out = X.new_empty(BATCH, p, p)
        if self.exact:
            gradients, halves = X.new_empty(BATCH, O, I), X.new_empty(BATCH * O, p)

            def corrected() -> torch.Tensor:
                torch.bmm(delta.mT, X, out=gradients)
                gradients.mul_(arguments["scale"])
                torch.mm(gradients.view(BATCH * O, I), right.T, out=halves)
                return torch.matmul(left, halves.view(BATCH, O, p), out=out)

            return corrected
        X_flat, delta_flat = X.flatten(0, 1), delta.flatten(0, 1)
        X_sketched, delta_sketched = (X.new_empty(len(X_flat), p) for _ in range(2))
        pairs = list(zip(left.view(-1, p, O), right.view(-1, p, I), strict=True))

        def factored() -> torch.Tensor:
            out.zero_()
            for left_r, right_r in pairs:
                torch.mm(X_flat, right_r.T, out=X_sketched)
                torch.mm(delta_flat, left_r.T, out=delta_sketched)
                out.baddbmm_(delta_sketched.view(BATCH, -1, p).mT, X_sketched.view(BATCH, -1, p))
            return out

        return factored


def layers(dtype: torch.dtype, device: str, quick: bool) -> list[Layer]:
    """The shapes of the grid, or a small part of it."""
    grid = [(SHAPES[0], 128), (SHAPES[-1], 512)] if quick else itertools.product(SHAPES, TOKENS)
    return [Layer(*shape, tokens, dtype, device) for shape, tokens in grid]
