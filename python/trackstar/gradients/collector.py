"""Per-example projected gradients of any torch model, from any loss, in any training loop."""

import fnmatch
import re
from types import TracebackType

import torch
from torch import nn

from trackstar.gradients.sketching import Sketch
from trackstar.gradients.spec import SketchSpec
from trackstar.gradients.tap import GradientTap
from trackstar.gradients.weights import Use
from trackstar.optimizer.correction import Correction


class GradientCollector:
    """Collects every example's projected gradient while ``loss.backward()`` runs.

        with GradientCollector(model, spec) as collector:
            loss.backward()          # after a forward pass inside the block
        collector.rows               # (B, L, d) float32

    For example z and block b the row is Σ P_L (∇Loss(z) ∘ V^(-1/2)) P_Rᵀ over the modules of the block,
    flattened row by row. No gradient of the weights is formed for it, no matrix of fan-out × fan-in is kept,
    and the weights' own ``.grad`` is computed or not exactly as it would be without the collector.

    What a row means depends on the loss: with the SUM of the examples' losses each row is the gradient of that
    example's own loss; a mean over the batch divides every row by its size.

    - A module that runs several times in a pass contributes the sum over its calls, as in ``.grad``.
    - A frozen weight is captured all the same: its row is the gradient that it would receive.
    - Several forward–backward passes inside one block (gradient accumulation) give their rows one after another.
    - An example that the loss masks out entirely has a row of zeros.
    - Examples packed end to end are told apart by ``offsets``.
    - Of a mixture's experts, an example's row holds the tokens that were routed to them; those of the experts that
      saw none are zero.

    Args:
        model: any torch model; its captured modules take the batch as first dimension.
        spec: what to capture; None is ``SketchSpec()``.
        correction: optimizer correction of every captured module, or None.

    Attributes:
        spec: what to capture.
        weights: {name: weight} of what is captured.
        modules: {name: the module that owns it}.
        block_of: {name: block index}.

    Raises:
        ValueError: the spec matches no module, or the correction lacks or misfits one.
    """

    def __init__(
        self, model: nn.Module, spec: SketchSpec | None = None, correction: Correction | None = None
    ) -> None:
        spec = SketchSpec() if spec is None else spec
        self.weights = spec.weights(model)
        self.modules = {name: weight.module for name, weight in self.weights.items()}
        self.block_of = spec.block_of(model)
        self.spec = spec
        self._blocks = max(self.block_of.values()) + 1
        self._sketches = {name: Sketch(weight, spec, correction) for name, weight in self.weights.items()}
        self._tap = GradientTap(self.weights, self._add, self._start_pass)
        self._passes: list[torch.Tensor] = []
        self._ran: set[str] = set()
        self._captured: set[str] = set()

    def __enter__(self) -> "GradientCollector":
        self._passes, self._ran, self._captured = [], set(), set()
        self._tap.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tap.__exit__(kind, error, trace)

    @property
    def offsets(self) -> torch.Tensor | None:
        """None, or for passes over packed examples the (B + 1,) int64 positions where they begin, and the end.

        Captured modules then see the examples' ΣT tokens end to end. Set it before the forward pass.
        """
        return self._tap.offsets

    @offsets.setter
    def offsets(self, offsets: torch.Tensor | None) -> None:
        self._tap.offsets = offsets

    @property
    def shape(self) -> tuple[int, int] | None:
        """(B, T) of padded passes, which then must fit; None to tell it from the modules' inputs."""
        return self._tap.shape

    @shape.setter
    def shape(self, shape: tuple[int, int] | None) -> None:
        self._tap.shape = shape

    @property
    def rows(self) -> torch.Tensor:
        """Rows (B, L, d) float32 of the examples seen since the block was entered, on the model's device.

        Raises:
            RuntimeError: no forward and backward pass ran inside the block, or a captured module received no
                gradient.
            FloatingPointError: a row holds NaN or Inf; :meth:`not_finite` tells which.
        """
        if not self._passes:
            raise RuntimeError(
                "no captured module ran inside the GradientCollector block: the forward pass belongs there too"
            )
        self._require_all_captured()
        damage = self.not_finite()
        if damage is not None:
            raise FloatingPointError(f"the gradient of example {damage[0]} by {damage[1]!r} holds NaN or Inf")
        return torch.cat(self._passes)

    def not_finite(self) -> tuple[int, str] | None:
        """Position of the first example whose row holds NaN or Inf, and a module that it comes from; or None."""
        damage = torch.cat(self._passes).isfinite().all(dim=2).logical_not().nonzero()
        if len(damage) == 0:
            return None
        example, block = damage[0].tolist()
        return example, next(name for name, b in self.block_of.items() if b == block)

    @property
    def row_shape(self) -> tuple[int, int]:
        """(L, d) of a row."""
        return self._blocks, self.spec.block_size

    def _start_pass(self, name: str) -> None:
        # A forward call after a backward pass begins the next pass; one DURING it is a recomputation
        # (gradient checkpointing) and belongs to the pass under way.
        recomputing = torch._C._current_graph_task_id() != -1
        if self._captured and not recomputing:
            self._require_all_captured()
            self._ran, self._captured = set(), set()
        self._ran.add(name)

    def _require_all_captured(self) -> None:
        # Experts of a mixture may do without tokens.
        captured = {self.weights[name].group for name in self._captured}
        missing = [
            name
            for name, weight in self.weights.items()
            if weight.group not in captured
            and not (weight.expert is not None and name in self._ran and self._tap.unfollowed(name) is None)
        ]
        if missing:
            reader = self._tap.unfollowed(missing[0])
            if reader is not None:
                why = f"is used through {reader!r}, whose gradients are not followed"
            elif missing[0] in self._ran:
                why = "took part in the forward pass but received no gradient"
            else:
                why = "did not run"
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            modules = [*(self.spec.modules or ()), *self._exclusions(missing)]
            raise RuntimeError(
                f"module {missing[0]!r}{more} {why}; leave it out: SketchSpec(modules={modules})"
            )

    def _exclusions(self, names: list[str]) -> list[str]:
        """Patterns that leave out these weights and no others."""
        patterns: dict[str, None] = {}
        for name in names:
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
            exact = set(fnmatch.filter(self.weights, pattern)) <= set(names)
            patterns["!" + (pattern if exact else name)] = None
        return list(patterns)

    def _add(self, use: Use) -> None:
        if not self._captured:
            self._passes.append(torch.zeros(use.examples, *self.row_shape, device=use.output_grads.device))
        rows = self._passes[-1]
        if len(rows) != use.examples:
            raise RuntimeError(
                f"module {use.name!r} must see the same batch as the others, {len(rows)} examples; "
                f"it saw {use.examples}"
            )
        self._captured.add(use.name)
        rows[:, self.block_of[use.name]] += self._sketches[use.name].of(use)
