"""Building a store: once per model and corpus, interruptible at any moment.

First the rows of a sample are collected for R_train, then every example's row is whitened and written,
shard by shard. Where the sample is the whole corpus (the usual case below 10,000 examples) the model runs
only once: its rows are kept until they have been whitened. A shard is a pure function of the model, the spec,
R_train and its range of examples, so a build that was killed and taken up again gives the same bytes.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import nn

from trackstar import fingerprint
from trackstar.collector import GradientCollector
from trackstar.correction import Correction
from trackstar.curvature import DAMPING, estimate_curvature
from trackstar.examples import Encoded, check_vocabulary, encode_examples
from trackstar.lean import LeanPass
from trackstar.manifest import Manifest, StoreError, make_folder
from trackstar.passes import check_model, position_limit, rows_of, vocabulary_size
from trackstar.plan import plan_build
from trackstar.progress import console, track
from trackstar.spec import SketchSpec
from trackstar.store import Store, open_store
from trackstar.writing import (
    read_staged,
    remove_folder,
    write_correction,
    write_curvature,
    write_shard,
    write_staged,
)
from trackstar_kernels import encode_rows

DTYPES = ("float32", "float16")
"""Dtypes of stored rows."""

SAMPLE = 10_000
"""Examples that R_train is the mean over, where there are more."""

SHARD_BYTES = 64 << 20
"""Float32 bytes of a shard's rows: what an interruption can cost, and what a scan keeps mapped."""

UNCOMMITTED = {"lock", "manifest.json.new", "correction.safetensors.new", "correction.safetensors"}
"""All that a build killed before its first commit can leave."""


@dataclass(frozen=True)
class _Build:
    """What one call of :func:`build_store` works with."""

    path: Path
    lean: LeanPass
    examples: Sequence[Encoded]
    collector: GradientCollector
    dtype: str
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

    def chunks(self, count: int) -> list[tuple[int, int]]:
        """``count`` examples in ranges of a shard each."""
        return [(start, min(start + self.shard_rows, count)) for start in range(0, count, self.shard_rows)]

    def waiting(self) -> list[tuple[int, int, int]]:
        """Chunks of the sample whose rows are not staged: (number, start, stop)."""
        chunks = enumerate(self.chunks(self.sample))
        return [(i, start, stop) for i, (start, stop) in chunks if not self.staged(i).is_dir()]

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
    dtype: str = "float16",
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
        examples: {"text": …} or {"input_ids": …, "labels": … (optional)}, each with an optional "id".
        tokenizer: the model's, for examples given as text.
        spec: what to capture and how to sketch it; None is ``SketchSpec()``.
        correction: optimizer correction, kept in the store so that queries get the same; None for none.
        dtype: "float16" or "float32".
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
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    for name, value in (("sample", sample), ("shard_rows", 1 if shard_rows is None else shard_rows)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    spec = SketchSpec() if spec is None else spec
    encoded = encode_examples(examples, tokenizer, position_limit(model))
    check_vocabulary(encoded, vocabulary_size(model), "examples")
    check_model(model)
    collector = GradientCollector(model, spec, correction)
    blocks, size = collector.row_shape
    if shard_rows is None:
        shard_rows = min(max(SHARD_BYTES // (4 * blocks * size), 16), 4096)
    lean = LeanPass(model, collector.modules.values())
    build = _Build(path, lean, encoded, collector, dtype, min(sample, len(encoded)), shard_rows)
    identity = {
        "spec": spec.as_dict(),
        "dtype": dtype,
        "model": fingerprint.of_model(model),
        "tokenizer": fingerprint.of_tokenizer(tokenizer),
        "data": fingerprint.of_examples(encoded),
        "correction": fingerprint.of_correction(correction),
        "curvature": {"sample": build.sample, "damping": DAMPING},
        "shard_rows": shard_rows,
    }
    with _exclusive(path):
        manifest = _open_or_create(build, identity, correction, resume)
        if not manifest.complete:
            plan = plan_build(
                lean,
                encoded,
                collector,
                correction,
                dtype,
                build.sample,
                path,
                written=manifest.committed,
                pending=build.pending_tokens(manifest),
            )
            console().print(str(plan), soft_wrap=True)
            for reason in lean.skipped:
                console().print(f"slower than it could be: {reason}", soft_wrap=True)
            plan.require_disk()
        if manifest.curvature is None:
            manifest = _commit_curvature(build, manifest)
        _commit_shards(build, manifest)
        remove_folder(path / "staging")
    return open_store(path)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold the store's lock, which the system lets go of however this process ends."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"path must be a folder, got the file {path}")
    make_folder(path)
    names = {entry.name for entry in path.iterdir()}
    if "manifest.json" not in names and names - UNCOMMITTED:
        raise StoreError(
            f"path must be an empty folder or hold a store; {path} holds {min(names - UNCOMMITTED)!r} "
            "and no manifest.json"
        )
    lock = filelock.FileLock(path / "lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise StoreError(f"another process is building the store at {path}") from None
    try:
        yield
    finally:
        lock.release()


def _open_or_create(
    build: _Build, identity: dict[str, Any], correction: Correction | None, resume: bool
) -> Manifest:
    manifest = Manifest.read(build.path)
    if manifest is not None:
        if not resume:
            raise StoreError(f"path must not hold a store when resume=False; {build.path} does")
        difference = first_difference(manifest.identity, identity)
        if difference is not None:
            field, kept, wanted = difference
            raise StoreError(
                f"the store at {build.path} was built with {field} = {kept!r}, this build has {wanted!r}: "
                "build into another folder"
            )
        return manifest
    for name in UNCOMMITTED - {"lock"}:
        (build.path / name).unlink(missing_ok=True)
    record = None if correction is None else write_correction(build.path, correction)
    manifest = Manifest(identity, build.collector.row_shape, len(build.examples), record)
    manifest.write(build.path)
    return manifest


def first_difference(kept: Any, wanted: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Where two trees of JSON values first differ: (dotted name, left, right), or None."""
    if isinstance(kept, dict) and isinstance(wanted, dict):
        for key in wanted | kept:
            found = first_difference(kept.get(key), wanted.get(key), f"{name}.{key}" if name else key)
            if found is not None:
                return found
        return None
    return None if kept == wanted else (name, kept, wanted)


def _commit_curvature(build: _Build, manifest: Manifest) -> Manifest:
    """Collect the sample's rows, chunk by chunk, and commit R_train."""
    indices = build.sample_indices()
    waiting = build.waiting()
    done = len(indices) - sum(stop - start for _, start, stop in waiting)
    label = "sampling" if build.sampled else "collecting"
    with track(label, len(indices), done) as advance:
        for number, start, stop in waiting:
            examples = [build.examples[i] for i in indices[start:stop]]
            rows = rows_of(build.lean, examples, build.collector, on_batch=advance)
            write_staged(build.staged(number), rows.numpy())
    numbers = range(len(build.chunks(build.sample)))
    staged = (torch.from_numpy(read_staged(build.staged(number))) for number in numbers)
    curvature = estimate_curvature(staged, *build.collector.row_shape)
    manifest = replace(manifest, curvature=write_curvature(build.path, curvature))
    manifest.write(build.path)
    if build.sampled:
        remove_folder(build.path / "staging")
    return manifest


def _commit_shards(build: _Build, manifest: Manifest) -> Manifest:
    """Whiten, write and commit every shard that is not there yet."""
    total = len(build.examples)
    done = manifest.committed
    whitener = Store(build.path, manifest).curvature.whitener if done < total else None
    with track("writing", total, done) as advance:
        for number, (start, stop) in enumerate(build.chunks(total)):
            if stop <= done:
                continue
            rows = _rows(build, number, start, stop, advance)
            codes, _, squared_norms = encode_rows(rows, whitener, build.dtype)
            examples = build.examples[start:stop]
            shard = write_shard(build.path, start, examples, codes.numpy(), squared_norms.numpy())
            manifest = replace(manifest, shards=(*manifest.shards, shard))
            manifest.write(build.path)
    return manifest


def _rows(build: _Build, number: int, start: int, stop: int, advance: Callable[[int], None]) -> torch.Tensor:
    """Rows of one shard before whitening: kept from the sample where that was the whole corpus."""
    if not build.sampled and build.staged(number).is_dir():
        advance(stop - start)
        return torch.from_numpy(read_staged(build.staged(number)))
    return rows_of(build.lean, build.examples[start:stop], build.collector, on_batch=advance)
