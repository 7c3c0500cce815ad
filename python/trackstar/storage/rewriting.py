"""Making a store from another one's rows, without the model: in another dtype, or whitened by another R_train.

The new store stands in a folder of its own. The old one is read and never changed, so that whoever reads it goes on
undisturbed; the examples' own files, which never change, are shared by hard links where the file system allows that.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trackstar.curvature import DAMPING, Curvature, accumulate, damped_curvature
from trackstar.progress import track
from trackstar.storage import fingerprint
from trackstar.storage.build import check_dtypes
from trackstar.storage.deletion import commit_deletions
from trackstar.storage.durable import require_disk
from trackstar.storage.layout import Layout, narrowest
from trackstar.storage.manifest import Manifest
from trackstar.storage.sealed import SealedFolder, share
from trackstar.storage.shard import StoredRows, write_shard
from trackstar.storage.store import Store, open_store
from trackstar.storage.writer import Writer, making
from trackstar.storage.writing import write_curvature


def reencode_store(
    path: str | os.PathLike[str], out: str | os.PathLike[str], dtype: str, *, wide: str | None = None
) -> Store:
    """Make a store of the same rows in another dtype, or finish what an earlier call began.

    Rows come from the widest form that the store at ``path`` keeps. Their norms are those before any narrowing. Deleted
    rows become zeros.

    Args:
        path: the store's folder.
        out: folder of the new store; made if missing.
        dtype: "float32", "float16", "int8", "int4" or "sign".
        wide: "float16" or "float32" keeps a wider copy of the rows beside int8, int4 or sign codes.

    Returns:
        The new store, opened.

    Raises:
        ValueError: ``dtype`` or ``wide`` is unknown.
        FileNotFoundError: there is no store at ``path``.
        StoreError: the store at ``path`` is incomplete or damaged; or ``out`` holds something else, or another
            process is writing to it.
        OSError: the disk is full or cannot be written; what was committed stays.
    """
    check_dtypes(dtype, wide)
    source = open_store(path)
    source.require_complete()
    layout = Layout(dtype, wide, *source.row_shape)
    curvature = source.curvature.with_rotation(layout.narrow)
    return _rewrite(source, Path(out), layout, curvature, source.identity["curvature"], "re-encoding")


def rewhiten_store(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, curvature: Curvature | None = None
) -> Store:
    """Make a store of the same rows whitened by another R_train, or finish what an earlier call began.

    y' = B' B⁻¹ y, with B and B' the whiteners: no training pass.

    Args:
        path: the store's folder.
        out: folder of the new store; made if missing.
        curvature: the new R_train, of another store, say; None takes the mean over all rows of this one that are not
            deleted, with damping 0.1.

    Returns:
        The new store, opened.

    Raises:
        ValueError: ``curvature`` is of another shape.
        FileNotFoundError: there is no store at ``path``.
        StoreError: the store at ``path`` is incomplete or damaged; or ``out`` holds something else, or another
            process is writing to it.
        OSError: the disk is full or cannot be written; what was committed stays.
    """
    source = open_store(path)
    source.require_complete()
    if curvature is None:
        how: dict[str, Any] = {"rows": len(source), "damping": DAMPING}
    else:
        if curvature.train.shape != source.curvature.train.shape:
            raise ValueError(
                f"curvature must have shape {tuple(source.curvature.train.shape)}, got "
                f"{tuple(curvature.train.shape)}: is it of another spec?"
            )
        how = {"given": fingerprint.of_curvature(curvature)}
        curvature = curvature.with_rotation(source.layout.narrow)
    return _rewrite(source, Path(out), source.layout, curvature, how, "re-whitening")


def _rewrite(
    source: Store, out: Path, layout: Layout, curvature: Curvature | None, how: dict[str, Any], label: str
) -> Store:
    """The store at ``out``: the source's rows, whitened by ``curvature`` or, if None, by their own, in ``layout``."""
    came_as = source.wide_dtype or source.dtype
    identity = source.identity | {
        "dtype": layout.dtype,
        "wide": layout.wide,
        "narrowed": narrowest(source.identity["narrowed"], came_as),
        "curvature": how,
    }
    begun = Manifest(identity, source.row_shape, source.parts, source.end)
    with making(out, begun) as writer:
        if not writer.manifest.finished:
            left = source.end - writer.manifest.committed
            require_disk(out, left * layout.row_bytes, label)
            _prepare(writer, source, curvature)
            _write_rows(writer, source, layout, label)
    return open_store(out)


def _prepare(writer: Writer, source: Store, curvature: Curvature | None) -> None:
    """Commit the correction, R_train and the deletions."""
    if writer.manifest.correction is None and source.manifest.correction is not None:
        correction = SealedFolder(source.path, "correction", source.manifest.correction)
        writer.commit(replace(writer.manifest, correction=share(correction, writer.path)))
    if writer.manifest.curvature is None:
        found = _own_curvature(source) if curvature is None else curvature
        writer.commit(replace(writer.manifest, curvature=write_curvature(writer.path, found)))
    commit_deletions(writer, source.deleted.numpy())


def _write_rows(writer: Writer, source: Store, layout: Layout, label: str) -> None:
    new, old = Store(writer.path, writer.manifest).curvature, source.curvature
    turn = None if torch.equal(new.whitener, old.whitener) else new.whitening_from(old)
    same = torch.equal(new.train, old.train)
    with track(label, source.end, writer.manifest.committed) as advance:
        while writer.manifest.committed < source.end:
            shard = source.shards[source.shards.find(writer.manifest.committed)]
            stored = StoredRows.encode(shard.floats(shard.start, shard.stop), turn, layout)
            if same:
                # Turning does not change a norm, and the source's is from before any narrowing.
                norms = shard.squared_norms.index_fill(0, shard.deleted, 0)
                stored = replace(stored, squared_norms=norms)
            writer.commit_shard(write_shard(writer.path, layout, shard.start, stored, shard))
            advance(len(shard))


def _own_curvature(source: Store) -> Curvature:
    """R_train of all rows that are not deleted, from the rows as they are stored."""
    blocks, size = source.row_shape
    whitened = torch.zeros(blocks, size, size, dtype=torch.float64)
    with track("collecting R_train", source.end) as advance:
        for shard in source.shards:
            accumulate(whitened, shard.floats(shard.start, shard.stop))
            advance(len(shard))
    # x = B⁻¹ y = R Bᵀ y, because BᵀB = R⁻¹.
    old = source.curvature
    back = old.train @ old.whitener.double().mT
    moment = back @ whitened.div_(len(source)) @ back.mT
    return damped_curvature(moment, rotated=source.layout.narrow)
