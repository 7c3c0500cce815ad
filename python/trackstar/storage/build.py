"""Building a store: once per model and corpus, interruptible at any moment.

First the rows of a sample are collected for R_train, then every example's row is whitened and written,
shard by shard. Where the sample is the whole corpus (the usual case below 10,000 examples) the model runs
only once: its rows are kept until they have been whitened. A shard is a pure function of the model, the spec,
R_train and its range of examples, so a build that was killed and taken up again gives the same bytes.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trackstar.curvature import DAMPING, Curvature, SecondMoment, damped_curvature
from trackstar.gradients.collector import GradientCollector
from trackstar.gradients.examples import Encoded, check_vocabulary, encode_examples
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.losses import Loss, output_function
from trackstar.gradients.numerics import check_numerics
from trackstar.gradients.passes import check_model, position_limit, rows_of, vocabulary_size
from trackstar.gradients.spec import SketchSpec
from trackstar.optimizer.correction import Correction
from trackstar.planning.plan import plan_build
from trackstar.progress import console, track
from trackstar.storage import fingerprint
from trackstar.storage.durable import remove_folder
from trackstar.storage.layout import CODES, WIDE, Layout
from trackstar.storage.manifest import Manifest
from trackstar.storage.shard import StoredRows, write_shard
from trackstar.storage.store import Store, open_store
from trackstar.storage.writer import Writer, making
from trackstar.storage.writing import read_staged, write_correction, write_curvature, write_staged

SAMPLE = 10_000
"""Examples that R_train is the mean over, where there are more."""


@dataclass(frozen=True)
class _Build:
    """What one call of :func:`build_store` works with."""

    path: Path
    lean: LeanPass
    examples: Sequence[Encoded]
    collector: GradientCollector
    loss: Loss
    sample: int
    shard_rows: int

    @property
    def sampled(self) -> bool:
        """Whether R_train comes from part of the corpus."""
        return self.sample < len(self.examples)

    def sample_indices(self) -> np.ndarray:
        """Positions of the sample, ascending: a fixed choice for a given corpus size."""
        if not self.sampled:
            return np.arange(len(self.examples))
        return np.sort(np.random.default_rng(0).choice(len(self.examples), self.sample, replace=False))

    def staged(self, number: int) -> Path:
        """Where the rows of the sample's ``number``-th chunk wait."""
        return self.path / "staging" / f"{number:08d}"

    def waiting(self) -> list[tuple[int, int, int]]:
        """Chunks of the sample whose rows are not staged: (number, start, stop)."""
        ranges = enumerate(chunks(self.sample, self.shard_rows))
        return [(i, start, stop) for i, (start, stop) in ranges if not self.staged(i).is_dir()]

    def pending_tokens(self, manifest: Manifest) -> int:
        """Tokens that the model has yet to run over."""
        pending = 0
        if manifest.curvature is None:
            indices = self.sample_indices()
            pending += sum(len(self.examples[i]) for _, a, b in self.waiting() for i in indices[a:b])
        if self.sampled:
            pending += sum(len(example) for example in self.examples[manifest.committed :])
        return pending


def build_store(
    path: str | os.PathLike[str],
    model: nn.Module,
    examples: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    spec: SketchSpec | None = None,
    correction: Correction | None = None,
    output: str = "loss",
    dtype: str = "float16",
    wide: str | None = None,
    curvature: Curvature | None = None,
    resume: bool = True,
    sample: int = SAMPLE,
    shard_rows: int | None = None,
) -> Store:
    """Encode a corpus into a store at ``path``, or finish what an earlier call began there.

    Says first what it will need (rows, disk, memory, time), then shows progress. May be killed at any moment:
    the next call with the same arguments goes on and ends with the same bytes.

    Args:
        path: folder of the store; made if missing.
        model: a causal language model of transformers, with finite weights.
        examples: {"text": …} or {"input_ids": …, "labels": … (optional)}, each with an optional "id" and optional
            "metadata", a mapping of JSON values.
        tokenizer: the model's, for examples given as text.
        spec: what to capture and how to sketch it; None is ``SketchSpec()``.
        correction: optimizer correction, kept in the store so that queries get the same; None for none.
        output: what a row is the gradient of, summed over the example's tokens: "loss" (the negative
            log-likelihood), "margin" or "logit".
        dtype: "float32", "float16", "int8", "int4" or "sign".
        wide: "float16" or "float32" keeps a wider copy of the rows beside int8, int4 or sign codes, from which the
            best are scored anew, so that answers are exactly those of the wider rows; None keeps the codes alone.
        curvature: R_train of another store, so that the two can be merged; None estimates it.
        resume: False refuses a path that already holds a store.
        sample: examples that R_train is estimated from; all, where there are no more.
        shard_rows: examples per shard; None for about 64 MB of float32.

    Returns:
        The complete store, opened.

    Raises:
        ValueError: an argument is not usable.
        StoreError: ``path`` holds something else, or a store of another model, corpus, spec, correction or
            dtype (the difference is named), or another process is building there.
        OSError: the disk is full or cannot be written; what was committed stays.
        FloatingPointError: an example's gradient is NaN or Inf.
    """
    path = Path(path)
    check_dtypes(dtype, wide)
    for name, value in (("sample", sample), ("shard_rows", 1 if shard_rows is None else shard_rows)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    loss = output_function(output)
    spec = SketchSpec() if spec is None else spec
    encoded = encode_examples(examples, tokenizer, position_limit(model))
    check_vocabulary(encoded, vocabulary_size(model), "examples")
    check_model(model)
    collector = GradientCollector(model, spec, correction)
    blocks, size = collector.row_shape
    if curvature is not None and curvature.train.shape != (blocks, size, size):
        raise ValueError(
            f"curvature must have shape {(blocks, size, size)}, got {tuple(curvature.train.shape)}: "
            "is it of another spec?"
        )
    if shard_rows is None:
        shard_rows = Layout(dtype, wide, blocks, size).shard_rows
    lean = LeanPass(model, collector.modules.values())
    sample = 0 if curvature is not None else min(sample, len(encoded))
    build = _Build(path, lean, encoded, collector, loss, sample, shard_rows)
    identity = {
        "spec": spec.as_dict(),
        "dtype": dtype,
        "wide": wide,
        "narrowed": None,
        "model": fingerprint.of_model(model),
        "tokenizer": fingerprint.of_tokenizer(tokenizer),
        "correction": fingerprint.of_correction(correction),
        "curvature": {"sample": sample, "damping": DAMPING}
        if curvature is None
        else {"given": fingerprint.of_curvature(curvature)},
        "shard_rows": shard_rows,
    } | ({} if output == "loss" else {"output": output})
    begun = Manifest(identity, (blocks, size), (fingerprint.of_examples(encoded),), len(encoded))
    with making(path, begun, resume=resume) as writer:
        if writer.manifest.committed < len(encoded):
            plan = plan_build(
                lean,
                encoded,
                collector,
                correction,
                writer.manifest.layout,
                build.sample,
                shard_rows,
                path,
                written=writer.manifest.committed,
                pending=build.pending_tokens(writer.manifest),
            )
            console().print(str(plan), soft_wrap=True)
            for reason in lean.skipped:
                console().print(f"slower than it could be: {reason}", soft_wrap=True)
            if (moved := check_numerics(lean, encoded, collector)) is not None:
                console().print(f"warning: {moved}", soft_wrap=True)
            plan.require_disk()
            if correction is not None and writer.manifest.correction is None:
                writer.commit(replace(writer.manifest, correction=write_correction(path, correction)))
            if writer.manifest.curvature is None:
                _commit_curvature(build, writer, curvature)
            commit_rows(writer, encoded, 0, build.shard_rows, lambda *job: _rows(build, *job))
        remove_folder(path / "staging")
    return open_store(path)


def check_dtypes(dtype: str, wide: str | None) -> None:
    """Require dtypes that a store can be of.

    Raises:
        ValueError: it cannot.
    """
    if dtype not in CODES:
        raise ValueError(f"dtype must be one of {', '.join(CODES)}; got {dtype!r}")
    if wide is not None and (wide not in WIDE or dtype in WIDE):
        raise ValueError(
            f"wide must be None, or {' or '.join(WIDE)} beside int8, int4 or sign; got {wide!r} beside {dtype}"
        )


def commit_rows(
    writer: Writer,
    examples: Sequence[Encoded],
    first: int,
    shard_rows: int,
    rows_of_shard: Callable[[int, int, int, Callable[[int], None]], torch.Tensor],
) -> None:
    """Whiten, write and commit every shard of ``examples`` that is not there yet.

    Args:
        writer: of the store.
        examples: those that the store's rows from ``first`` on are of.
        first: where they begin; the store holds at least as many rows.
        shard_rows: examples per shard.
        rows_of_shard: rows (n, L, d) float32 of examples[start:stop], given (number of the shard among these
            examples, start, stop, what to tell how many are done).
    """
    layout = writer.manifest.layout
    done = writer.manifest.committed - first
    if done == len(examples):
        return
    whitener = Store(writer.path, writer.manifest).curvature.whitener
    with track("writing", len(examples), done) as advance:
        for number, (start, stop) in enumerate(chunks(len(examples), shard_rows)):
            if start >= done:
                rows = StoredRows.encode(rows_of_shard(number, start, stop, advance), whitener, layout)
                shard = write_shard(writer.path, layout, first + start, rows, examples[start:stop])
                writer.commit_shard(shard)


def chunks(count: int, size: int) -> list[tuple[int, int]]:
    """``count`` things in ranges of ``size``."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _commit_curvature(build: _Build, writer: Writer, given: Curvature | None) -> None:
    """Commit R_train: ``given``, or collected from the sample, chunk by chunk."""
    rotated = writer.manifest.layout.narrow
    if given is not None:
        found = given.with_rotation(rotated)
        writer.commit(replace(writer.manifest, curvature=write_curvature(build.path, found)))
        return
    indices = build.sample_indices()
    waiting = build.waiting()
    done = len(indices) - sum(stop - start for _, start, stop in waiting)
    label = "sampling" if build.sampled else "collecting"
    with track(label, len(indices), done) as advance:
        for number, start, stop in waiting:
            examples = [build.examples[i] for i in indices[start:stop]]
            rows = rows_of(build.lean, examples, build.collector, loss=build.loss, on_batch=advance)
            write_staged(build.staged(number), rows.numpy())
    moment = SecondMoment(*build.collector.row_shape)
    for number in range(len(chunks(build.sample, build.shard_rows))):
        moment.add(torch.from_numpy(read_staged(build.staged(number))))
    found = damped_curvature(moment.mean, rotated=rotated)
    if (doubts := moment.doubts()) is not None:
        console().print(f"warning: {doubts}", soft_wrap=True)
    writer.commit(replace(writer.manifest, curvature=write_curvature(build.path, found)))
    if build.sampled:
        remove_folder(build.path / "staging")


def _rows(build: _Build, number: int, start: int, stop: int, advance: Callable[[int], None]) -> torch.Tensor:
    """Rows of one shard before whitening: kept from the sample where that was the whole corpus."""
    if not build.sampled and build.staged(number).is_dir():
        advance(stop - start)
        return torch.from_numpy(read_staged(build.staged(number)))
    examples = build.examples[start:stop]
    return rows_of(build.lean, examples, build.collector, loss=build.loss, on_batch=advance)
