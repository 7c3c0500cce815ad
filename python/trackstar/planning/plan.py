"""What a build and a query need, said before they start."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from trackstar.gradients.blocks import group_weights
from trackstar.gradients.collector import GradientCollector
from trackstar.gradients.examples import Encoded
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.passes import BATCH_TOKENS, has_loss, position_limit, rows_of
from trackstar.gradients.sketching import sketch_bytes
from trackstar.gradients.spec import SketchSpec
from trackstar.optimizer.correction import Correction
from trackstar.planning.dry_run import MemoryMeter, dry_run
from trackstar.planning.needs import Corpus, Job, Question
from trackstar.planning.rates import Rates
from trackstar.storage.durable import require_disk
from trackstar.storage.layout import Layout

LEAN_SHARE = 0.8
"""Part of a lean pass that matrix products take: measured on a CPU (benchmarks/pipeline.py)."""


def planned_job(
    model: Any,
    spec: SketchSpec,
    corpus: Corpus,
    *,
    dtype: str,
    wide: str | None,
    correction: str,
    rank: int,
    sample: int,
    rates: Rates,
) -> Job:
    """A build of a model that is known by its shapes alone.

    Args:
        model: from :func:`trackstar.planning.dry_run.model_of_shapes`.
        spec: what is captured.
        corpus: the examples.
        dtype: of the stored rows.
        wide: dtype of the wider copy, or None.
        correction: "none", "rank" or "exact".
        rank: of the rank correction.
        sample: examples that R_train is estimated from.
        rates: of the machine.

    Raises:
        ValueError: the model cannot be run on shapes, or the spec does not fit it.
    """
    weights = spec.weights(model)
    blocks = len(set(group_weights(list(weights), spec.blocks).values()))
    layout = Layout(dtype, wide, blocks, spec.block_size)
    limit = position_limit(model) or corpus.longest
    length = max(min(corpus.longest, limit), 2)
    count = min(max(BATCH_TOKENS // length, 1), corpus.examples)
    tokens = np.ones(length, np.int32)
    cost = dry_run(model, weights, [Encoded("", "", tokens, tokens)] * count)
    p, r = spec.sketch, rank if correction == "rank" else 1
    # A token sees few experts of a mixture, which are a group.
    met = {weight.group: weight.shape for weight in weights.values()}.values()
    both, entries = sum(o + i for o, i in met), sum(o * i for o, i in met)
    # For every token the two factors of the gradient are projected, or their product is formed and corrected.
    projecting = 2 * entries + 2 * entries * p / length if correction == "exact" else 2 * r * p * both
    shapes = [weight.shape for weight in weights.values()]
    kept = {
        "none": 0,
        "rank": sum(4 * r * (o + i) for o, i in shapes),
        "exact": sum(4 * o * i for o, i in shapes),
    }[correction]
    flops = cost.flops / (count * length) + projecting
    rows = 2 * 4 * count * layout.blocks * layout.size
    return Job(
        weights=weight_bytes(model),
        sketches=sketch_bytes(weights.values(), spec, r),
        correction=kept,
        layout=layout,
        shard_rows=layout.shard_rows,
        sample=sample,
        corpus=corpus,
        pass_bytes=cost.bytes + rows,
        seconds_per_token=flops / rates.flops / LEAN_SHARE,
    )


def describe(job: Job, question: Question, rates: Rates) -> list[str]:
    """Disk, a build's memory and time, and a query's: memory, time from disk, and time from memory."""
    cold, warm = (job.query_seconds(question, rates, cold=cold) for cold in (True, False))
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if rates.memory is None else None
    if held is not None and job.store_bytes > held:
        warm = cold
    return [
        amount(job.store_bytes),
        amount(job.build_memory),
        duration(job.build_seconds(rates)),
        amount(job.query_memory(question)),
        *("unknown" if seconds is None else duration(seconds) for seconds in (cold, warm)),
    ]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Needs of a build, or of the rest of one.

    Attributes:
        path: where.
        rows: examples still to be written.
        row_shape: (L, d).
        store_bytes: disk that the finished store takes.
        staging_bytes: disk that is needed on top of it until the build ends.
        written_bytes: disk that an earlier run has already filled.
        memory_bytes: peak memory, beyond that of an idle process.
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
            f"{amount(self.store_bytes)} on disk (and {amount(self.staging_bytes)} until it is done), "
            f"about {amount(self.memory_bytes)} of memory at most, about {duration(self.seconds)}"
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
    shard_rows: int,
    path: Path,
    *,
    written: int,
    pending: int,
) -> Plan:
    """Plan a build that is about to start; runs one batch to see how fast the model is and what it takes.

    Args:
        lean: passes of the model that is attributed.
        examples: the whole corpus.
        collector: what collects its rows.
        correction: the collector's correction.
        layout: of the stored rows.
        sample: examples that R_train is estimated from.
        shard_rows: examples per shard.
        path: where the store goes.
        written: examples whose rows are already in the store.
        pending: tokens that the model has yet to run over.
    """
    pass_bytes, seconds = _tried(lean, examples, collector)
    rank = 1 if correction is None or correction.rank is None else correction.rank
    job = Job(
        weights=weight_bytes(lean.model),
        sketches=sketch_bytes(collector.weights.values(), collector.spec, rank),
        correction=0 if correction is None else correction.bytes,
        layout=layout,
        shard_rows=shard_rows,
        sample=sample,
        corpus=Corpus.of(examples),
        pass_bytes=pass_bytes,
        seconds_per_token=seconds,
    )
    return Plan(
        path=path,
        rows=len(examples) - written,
        row_shape=collector.row_shape,
        store_bytes=job.store_bytes,
        staging_bytes=job.staging_bytes,
        written_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        memory_bytes=job.build_memory,
        seconds=pending * seconds,
    )


def _tried(lean: LeanPass, examples: Sequence[Encoded], collector: GradientCollector) -> tuple[int, float]:
    """Most memory of a pass beyond the weights, and seconds per token, from a batch of the longer half of examples."""
    counted = sorted((example for example in examples if has_loss(example)), key=len)
    if not counted:
        return 0, 0.0
    longer = counted[len(counted) // 2 :]
    batch = [longer[i] for i in lean.batches([len(example) for example in longer], BATCH_TOKENS)[0]]
    tokens = sum(len(example) for example in batch)
    began = time.perf_counter()
    with MemoryMeter() as memory:
        rows_of(lean, batch, collector)
    seconds = (time.perf_counter() - began) / tokens
    largest = min(max(BATCH_TOKENS, len(counted[-1])), sum(len(example) for example in counted))
    return memory.peak * largest // tokens, seconds


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def amount(count: float) -> str:
    """Bytes, in words."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def duration(seconds: float) -> str:
    """Seconds, in words."""
    for unit, length, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48), ("days", 86400, 700)):
        if seconds < most * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400 / 365:.3g} years"
