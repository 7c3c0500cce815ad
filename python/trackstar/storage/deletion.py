"""Taking rows out of a store: the rest keeps its numbers."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from mmap_ninja import numpy as np_ninja

from trackstar.storage.durable import new_folder
from trackstar.storage.sealed import seal
from trackstar.storage.store import Store, open_store, read_deletions
from trackstar.storage.writer import Writer, writing


def delete_rows(path: str | os.PathLike[str], indices: Iterable[int]) -> Store:
    """Delete rows: scans, counts and answers leave them out from now on, all other rows keep their indices.

    One atomic commit. The rows' bytes stay in the shards until the store is re-encoded, and their texts in every store
    that shares those files. Rows that are deleted already do no harm.

    Args:
        path: the store's folder.
        indices: of the rows.

    Returns:
        The store, opened.

    Raises:
        TypeError: an index is not an int.
        ValueError: an index is not one of the store's.
        FileNotFoundError: there is no store at ``path``.
        StoreError: the store is incomplete or damaged, or another process is writing to it.
        OSError: the disk is full or cannot be written.
    """
    path = Path(path)
    wanted = np.unique([_checked(index) for index in indices]).astype(np.int64)
    with writing(path) as writer:
        store = Store(path, writer.manifest)
        store.require_complete()
        for index in wanted:
            if not 0 <= index < store.end:
                raise ValueError(f"indices must be from 0 to {store.end - 1}, got {index}")
        commit_deletions(writer, wanted)
    return open_store(path)


def commit_deletions(writer: Writer, indices: np.ndarray) -> None:
    """Commit that rows are deleted, given their indices, int64, ascending; those that are already are left out."""
    known = read_deletions(writer.path, writer.manifest)
    rows = np.setdiff1d(indices, known, assume_unique=True)
    if len(rows) == 0:
        return
    deletions = writer.manifest.deletions
    with new_folder(writer.path / f"deletions/{len(deletions):08d}", rows.nbytes) as folder:
        np_ninja.from_ndarray(folder / "rows", rows)
        found = seal(folder)
    writer.commit(replace(writer.manifest, deletions=(*deletions, (len(rows), found))))


def _checked(index: int) -> int:
    if isinstance(index, bool) or not isinstance(index, int | np.integer):
        raise TypeError(f"indices must be ints, got {index!r}")
    return int(index)
