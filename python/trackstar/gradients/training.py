"""Rows of training examples while a Hugging Face Trainer trains on them."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback

from trackstar.gradients.collector import GradientCollector
from trackstar.gradients.spec import SketchSpec
from trackstar.optimizer.correction import Correction

OnRows = Callable[[int, torch.Tensor | None, torch.Tensor], None]
"""Takes the number of an optimizer step, and of its examples the positions in the training set and the rows."""


class TrainerRows(TrainerCallback):
    """Collects the row of every example that a Trainer trains on.

        collected = TrainerRows(SketchSpec(sketch=16))
        Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[collected]).train()
        collected.rows       # (n, L, d) float32 on the CPU, in the order in which examples were trained on
        collected.indices    # (n,) int64, their positions in the training set
        collected.steps      # (n,) int64, the optimizer step that each went into, from 0

    A row is the gradient of the example's share of its step's loss, by the weights before that step, with dropout
    where the model has any. The Trainer averages over the predictions of a step, so rows of a step with n of
    them are an n-th of those that ``collect_rows`` gives. Training is not changed.

    Args:
        spec: what to capture; None is ``SketchSpec()``.
        correction: optimizer correction, or None.
        on_rows: called after each optimizer step, and nothing is kept; None keeps everything.

    Attributes:
        indices: None where the Trainer does not tell: in several processes, from a dataset without positions, or
            when it takes up an earlier run.

    Raises, when training begins:
        ValueError: the spec does not fit the model, or the Trainer trains in float16, which scales losses.
    """

    def __init__(
        self,
        spec: SketchSpec | None = None,
        correction: Correction | None = None,
        on_rows: OnRows | None = None,
    ) -> None:
        self._spec, self._correction = spec, correction
        self._on_rows = self._keep if on_rows is None else on_rows
        self._kept: list[tuple[int, torch.Tensor | None, torch.Tensor]] = []
        self._collector: GradientCollector
        self._order: _Recorded | None = None

    @property
    def rows(self) -> torch.Tensor:
        """Rows (n, L, d) float32 on the CPU."""
        return torch.cat([rows for _, _, rows in self._kept])

    @property
    def indices(self) -> torch.Tensor | None:
        """Positions (n,) int64 in the training set, None where they are not known."""
        known = [indices for _, indices, _ in self._kept if indices is not None]
        return torch.cat(known) if len(known) == len(self._kept) else None

    @property
    def steps(self) -> torch.Tensor:
        """Optimizer steps (n,) int64."""
        return torch.cat([torch.full((len(rows),), step) for step, _, rows in self._kept])

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called by the Trainer."""
        if args.fp16:
            raise ValueError(
                "TrainerRows must see losses as they are; training in float16 scales them: use bfloat16"
            )
        self._collector = GradientCollector(given["model"], self._spec, self._correction)
        alone = args.world_size == 1 and state.global_step == 0
        self._order = _record(given.get("train_dataloader")) if alone else None

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called by the Trainer."""
        self._collector.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called by the Trainer."""
        self._collector.__exit__(None, None, None)
        rows = self._collector.rows.cpu()
        indices = None
        if self._order is not None:
            indices = torch.tensor([self._order.drawn.popleft() for _ in rows])
        self._on_rows(state.global_step - 1, indices, rows)

    def _keep(self, step: int, indices: torch.Tensor | None, rows: torch.Tensor) -> None:
        self._kept.append((step, indices, rows))


class _Recorded(Sampler[int]):
    """A sampler that remembers what it drew: in the order of the batches, which may be fetched ahead."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.drawn: deque[int] = deque()

    def __iter__(self) -> Iterator[int]:
        self.drawn.clear()  # of what an incomplete last batch left out
        for index in self.sampler:
            self.drawn.append(index)
            yield index

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


def _record(loader: Any) -> _Recorded | None:
    """Have a data loader's sampler remember its order; None where it has none."""
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    if not hasattr(batches, "sampler"):
        return None
    batches.sampler = _Recorded(batches.sampler)
    return batches.sampler
