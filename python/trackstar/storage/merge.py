"""Putting several stores into one."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trackstar.errors import StoreError
from trackstar.progress import track
from trackstar.storage.deletion import commit_deletions
from trackstar.storage.durable import require_disk
from trackstar.storage.layout import narrowest
from trackstar.storage.manifest import Manifest, ShardRecord
from trackstar.storage.sealed import SealedFolder, share
from trackstar.storage.store import Store, open_store
from trackstar.storage.writer import Writer, first_difference, making

SHARED = ("spec", "dtype", "wide", "model", "tokenizer", "correction")
"""What the identities of stores that are merged have in common."""


def merge_stores(out: str | os.PathLike[str], paths: Sequence[str | os.PathLike[str]]) -> Store:
    """Make one store of several, or finish what an earlier call began.

    The rows of each store follow those of the one before. Deleted rows stay deleted and keep their places. Shards
    are shared by hard links where the file system allows that, so that merging copies nothing; their checksums
    stay what they were, and are not compared.

    Args:
        out: folder of the new store; made if missing.
        paths: the stores' folders, in order.

    Returns:
        The new store, opened.

    Raises:
        ValueError: there are no stores.
        FileNotFoundError: there is no store at one of the paths.
        StoreError: the stores differ in spec, dtype, model, tokenizer, correction or R_train (the difference is
            named); one is incomplete or damaged; ``out`` holds something else, or another process is writing to it.
        OSError: the disk is full or cannot be written; what was committed stays.
    """
    out = Path(out)
    stores = [open_store(path) for path in paths]
    if not stores:
        raise ValueError("paths must name at least one store, got none")
    for store in stores:
        store.require_complete()
        _require_alike(stores[0], store)
    narrowed = narrowest(*(store.identity["narrowed"] for store in stores))
    begun = Manifest(
        stores[0].identity | {"narrowed": narrowed},
        stores[0].row_shape,
        tuple(part for store in stores for part in store.parts),
        sum(store.end for store in stores),
    )
    with making(out, begun) as writer:
        if not writer.manifest.finished:
            require_disk(out, _bytes_to_copy(out, stores), "the merge")
            _prepare(writer, stores)
            _share_shards(writer, stores)
    return open_store(out)


def _require_alike(first: Store, other: Store) -> None:
    kept, found = (
        {field: store.identity[field] for field in SHARED} | {"output": store.output}
        for store in (first, other)
    )
    difference = first_difference(kept, found)
    if difference is not None:
        field, wanted, got = difference
        raise StoreError(
            f"{other.path} cannot be merged with {first.path}: its {field} is {got!r} instead of {wanted!r}"
        )
    if first.manifest.curvature != other.manifest.curvature:
        raise StoreError(
            f"{other.path} cannot be merged with {first.path}: its R_train is another. Give rewhiten_store the "
            "curvature of one of them to whiten the other's rows alike"
        )


def _bytes_to_copy(out: Path, stores: Sequence[Store]) -> int:
    """Bytes of the shards that lie on other disks than ``out`` and cannot be shared."""
    return sum(
        record.seal.bytes
        for store in stores
        if store.path.stat().st_dev != out.stat().st_dev
        for record in store.shards.records
    )


def _prepare(writer: Writer, stores: Sequence[Store]) -> None:
    """Commit the correction, R_train and the deletions."""
    for name in ("correction", "curvature"):
        seal = getattr(stores[0].manifest, name)
        if seal is not None and getattr(writer.manifest, name) is None:
            change: dict[str, Any] = {name: share(SealedFolder(stores[0].path, name, seal), writer.path)}
            writer.commit(replace(writer.manifest, **change))
    starts = np.cumsum([0, *(store.end for store in stores)])
    deleted = [store.deleted.numpy() + start for store, start in zip(stores, starts[:-1], strict=True)]
    commit_deletions(writer, np.concatenate(deleted))


def _share_shards(writer: Writer, stores: Sequence[Store]) -> None:
    first = 0
    with track("merging", writer.manifest.total, writer.manifest.committed) as advance:
        for store in stores:
            for record in store.shards.records:
                start, stop = first + record.start, first + record.stop
                if stop > writer.manifest.committed:
                    folder = SealedFolder(store.path, record.path, record.seal)
                    share(folder, writer.path, ShardRecord.path_of(start, stop))
                    writer.commit_shard(ShardRecord(start, stop, record.seal))
                    advance(stop - start)
            first += store.end
