"""What a build will need, said before it starts."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from trackstar.collector import GradientCollector
from trackstar.correction import Correction
from trackstar.durable import require_disk
from trackstar.examples import Encoded
from trackstar.layout import Layout
from trackstar.lean import LeanPass
from trackstar.modules import fan, select_modules
from trackstar.passes import BATCH_TOKENS, has_loss, rows_of, vocabulary_size
from trackstar.shard import example_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """Needs of a build.

    Attributes:
        path: where.
        rows: examples still to be written.
        row_shape: (L, d).
        store_bytes: disk that the finished store takes.
        staging_bytes: disk that is needed on top of it until the build ends.
        written_bytes: disk that an earlier run has already filled.
        memory_bytes: peak memory of the process, roughly: the model, one batch's activations, one shard of
            rows, R_train.
        seconds: rough duration, from one timed batch.
    """

    path: Path
    rows: int
    row_shape: tuple[int, int]
    store_bytes: int
    staging_bytes: int
    written_bytes: int
    memory_bytes: int
    seconds: float

    def __str__(self) -> str:
        blocks, size = self.row_shape
        return (
            f"{self.rows:,} rows of {blocks} × {size} to write at {self.path}: "
            f"{_amount(self.store_bytes)} on disk (and {_amount(self.staging_bytes)} until it is done), "
            f"about {_amount(self.memory_bytes)} of memory at most, about {_duration(self.seconds)}"
        )

    def require_disk(self) -> None:
        """Raise OSError where the disk has less free than the build will write."""
        require_disk(self.path, self.store_bytes + self.staging_bytes - self.written_bytes, "the build")


def plan_build(
    lean: LeanPass,
    examples: Sequence[Encoded],
    collector: GradientCollector,
    correction: Correction | None,
    layout: Layout,
    sample: int,
    path: Path,
    *,
    written: int = 0,
    pending: int | None = None,
) -> Plan:
    """Plan a build, or the rest of one; runs one batch of middling length to see how fast the model is.

    Args:
        lean: passes of the model that is attributed.
        examples: the whole corpus.
        collector: what collects its rows.
        correction: the collector's correction.
        layout: of the stored rows.
        sample: examples that R_train is estimated from.
        path: where the store goes.
        written: examples whose rows are already in the store.
        pending: tokens that the model has yet to run over; None for those of a build that has not begun.
    """
    blocks, size = collector.row_shape
    count = len(examples)
    staging = 4 * sample * blocks * size
    curvature = blocks * size * (12 * size + 8) + 8 * blocks
    corrections = 0 if correction is None else correction.bytes
    store = count * layout.row_bytes + example_bytes(examples) + curvature + corrections
    if pending is None:
        tokens = sum(len(example) for example in examples)
        pending = tokens + (tokens * sample // count if sample < count else 0)
    return Plan(
        path=path,
        rows=count - written,
        row_shape=(blocks, size),
        store_bytes=store,
        staging_bytes=staging,
        written_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        memory_bytes=_memory(lean, collector, correction),
        seconds=pending * _seconds_per_token(lean, examples, collector) if pending else 0.0,
    )


def _memory(lean: LeanPass, collector: GradientCollector, correction: Correction | None) -> int:
    """Model + correction + a batch's activations and logits + a shard of rows, twice + R_train in its forms."""
    weights = sum(p.numel() * p.element_size() for p in lean.model.parameters())
    features = sum(sum(fan(module)) for module in select_modules(lean.model).values())
    # Activations are kept once, gradients and the attention's own buffers about double them.
    activations = BATCH_TOKENS * 4 * 2 * features
    logits = lean.logit_tokens(BATCH_TOKENS) * 4 * vocabulary_size(lean.model)
    blocks, size = collector.row_shape
    return (
        weights
        + (0 if correction is None else correction.bytes)
        + activations
        + logits
        + 2 * (64 << 20)
        + 28 * blocks * size * size
    )


def _seconds_per_token(lean: LeanPass, examples: Sequence[Encoded], collector: GradientCollector) -> float:
    counted = sorted((example for example in examples if has_loss(example)), key=len)
    if not counted:
        return 0.0
    middle = counted[len(counted) // 2 :]
    batch = [middle[i] for i in lean.batches([len(example) for example in middle], BATCH_TOKENS)[0]]
    rows_of(lean, batch[:1], collector)
    began = time.perf_counter()
    rows_of(lean, batch, collector)
    return (time.perf_counter() - began) / sum(len(example) for example in batch)


def _amount(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
