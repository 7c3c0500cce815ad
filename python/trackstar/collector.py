"""Per-example projected gradients of any torch model, from any loss, in any training loop."""

from types import TracebackType

import torch
from torch import nn

from trackstar.correction import Correction
from trackstar.modules import fan, select_modules
from trackstar.spec import SketchSpec
from trackstar.tap import GradientTap
from trackstar_kernels import project_gradients


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

    Args:
        model: any torch model; its captured modules take the batch as first dimension.
        spec: what to capture; None is ``SketchSpec()``.
        correction: optimizer correction of every captured module, or None.

    Attributes:
        modules: {name: module} of what is captured.
        block_of: {name: block index}.
        offsets: None, or for passes over packed examples (captured modules see their ΣT tokens end to end) the
            (B + 1,) int64 positions where they begin, and the end. Set it before the forward pass.

    Raises:
        ValueError: the spec matches no module, or the correction lacks or misfits one.
    """

    def __init__(
        self, model: nn.Module, spec: SketchSpec | None = None, correction: Correction | None = None
    ) -> None:
        spec = SketchSpec() if spec is None else spec
        self.modules = select_modules(model, spec.modules)
        self.block_of = spec.block_of(model)
        self.offsets: torch.Tensor | None = None
        self._spec = spec
        self._blocks = max(self.block_of.values()) + 1
        self._sketches: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}
        for name, module in self.modules.items():
            fan_in, fan_out = fan(module)
            left, right = spec.projections(name, fan_in, fan_out)
            scale = None
            if correction is not None:
                left, right, scale = correction.fold(name, left, right)
            self._sketches[name] = left, right, scale
        self._tap = GradientTap(self.modules, self._add, self._start_pass)
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
        return self._blocks, self._spec.block_size

    def _start_pass(self, name: str) -> None:
        # A forward call after a backward pass begins the next pass; one DURING it is a recomputation
        # (gradient checkpointing) and belongs to the pass under way.
        recomputing = torch._C._current_graph_task_id() != -1
        if self._captured and not recomputing:
            self._require_all_captured()
            self._ran, self._captured = set(), set()
        self._ran.add(name)

    def _require_all_captured(self) -> None:
        missing = [name for name in self._sketches if name not in self._captured]
        if missing:
            why = (
                "took part in the forward pass but received no gradient"
                if missing[0] in self._ran
                else "did not run"
            )
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise RuntimeError(
                f"module {missing[0]!r}{more} {why}; leave it out through SketchSpec(modules=…)"
            )

    def _add(self, name: str, activations: torch.Tensor, output_grads: torch.Tensor) -> None:
        if self.offsets is not None:
            activations, output_grads = activations.flatten(0, 1), output_grads.flatten(0, 1)
            if len(activations) != self.offsets[-1]:
                raise RuntimeError(
                    f"module {name!r} must see the {self.offsets[-1]} tokens of offsets, got {len(activations)}"
                )
        batch = len(activations) if self.offsets is None else len(self.offsets) - 1
        if not self._captured:
            self._passes.append(torch.zeros(batch, *self.row_shape, device=output_grads.device))
        rows = self._passes[-1]
        if len(rows) != batch:
            raise RuntimeError(
                f"module {name!r} must see the same batch as the others, {len(rows)} examples; it saw {batch}"
            )
        self._captured.add(name)
        left, right, scale = self._constants(name, rows.device)
        if activations.dtype != output_grads.dtype or activations.dtype == torch.float64:
            activations, output_grads = activations.float(), output_grads.float()
        projected = project_gradients(
            activations, output_grads, left, right, scale=scale, offsets=self.offsets, check_finite=False
        )
        rows[:, self.block_of[name]] += projected.flatten(1)

    def _constants(
        self, name: str, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Sketches and scale of a module, moved to where it runs once and for all."""
        left, right, scale = self._sketches[name]
        if left.device != device:
            left, right = left.to(device), right.to(device)
            self._sketches[name] = left, right, None if scale is None else scale.to(device)
        return self._sketches[name]
