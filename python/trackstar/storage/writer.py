"""Work on a store: one process at a time, one atomic commit after another."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock

from trackstar.errors import StoreError
from trackstar.storage.durable import make_folder
from trackstar.storage.index import with_shard
from trackstar.storage.manifest import Manifest, ShardRecord

LEFTOVERS = {"lock", "manifest.json.new"}
"""All that work killed before its first commit can leave."""


class Writer:
    """A store whose lock this process holds.

    Attributes:
        path: the store's folder.
        manifest: what is committed.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def commit(self, manifest: Manifest) -> None:
        """Commit a manifest."""
        manifest.write(self.path)
        self.manifest = manifest

    def commit_shard(self, shard: ShardRecord) -> None:
        """Commit one more shard; with the last one, the work is finished and its rows are part of the store."""
        manifest = with_shard(self.path, self.manifest, shard)
        if shard.stop == manifest.total:
            manifest = replace(manifest, finished=manifest.total)
        self.commit(manifest)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """Hold the lock of the store at ``path``, which the system lets go of however this process ends.

    Raises:
        FileNotFoundError: there is no store.
        StoreError: its manifest is damaged, or another process is writing to it.
        OSError: the folder cannot be written to.
    """
    if Manifest.read(path) is None:
        raise FileNotFoundError(f"there is no store at {path} (no manifest.json)")
    with locked(path):
        manifest = Manifest.read(path)
        if manifest is None:
            raise FileNotFoundError(f"there is no store at {path} (no manifest.json)")
        yield Writer(path, manifest)


@contextlib.contextmanager
def making(path: Path, begun: Manifest, *, resume: bool = True) -> Iterator[Writer]:
    """The same for a store to be made at ``path``, or to be gone on with where it is the same as ``begun``.

    Args:
        path: a folder that is missing, empty, or holds the store.
        begun: what the store's first commit says.
        resume: False refuses a path that already holds a store.

    Raises:
        StoreError: ``path`` holds something else, or another store (the difference is named), or another process is
            writing to it.
        OSError: the folder cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise StoreError(f"path must be a folder, got the file {path}")
    make_folder(path)
    names = {entry.name for entry in path.iterdir()}
    if "manifest.json" not in names and names - LEFTOVERS:
        raise StoreError(
            f"path must be an empty folder or hold a store; {path} holds {min(names - LEFTOVERS)!r} "
            "and no manifest.json"
        )
    with locked(path):
        manifest = Manifest.read(path)
        if manifest is None:
            begun.write(path)
            manifest = begun
        elif not resume:
            raise StoreError(f"path must not hold a store when resume=False; {path} does")
        # Later appends may have added parts.
        first = first_difference(_described(manifest, begun), _described(begun, begun))
        if first is not None:
            field, kept, wanted = first
            raise StoreError(
                f"the store at {path} was built with {field} = {kept!r}, this build has {wanted!r}: "
                "build into another folder"
            )
        yield Writer(path, manifest)


def first_difference(kept: Any, wanted: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Where two trees of JSON values first differ: (dotted name, left, right), or None."""
    if isinstance(kept, dict) and isinstance(wanted, dict):
        for key in wanted | kept:
            found = first_difference(kept.get(key), wanted.get(key), f"{name}.{key}" if name else key)
            if found is not None:
                return found
        return None
    return None if kept == wanted else (name, kept, wanted)


def _described(manifest: Manifest, begun: Manifest) -> dict[str, Any]:
    """What two manifests must agree in."""
    parts = {f"data[{i}]": part for i, part in enumerate(manifest.parts[: len(begun.parts)])}
    return parts | manifest.identity | {"row_shape": list(manifest.row_shape)}


@contextlib.contextmanager
def locked(path: Path, kind: str = "store") -> Iterator[None]:
    """Hold the lock of a folder that is written to, which the system lets go of however this process ends.

    Args:
        path: the folder.
        kind: what it holds.

    Raises:
        StoreError: another process holds it.
    """
    lock = filelock.FileLock(path / "lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise StoreError(f"another process is writing to the {kind} at {path}") from None
    try:
        yield
    finally:
        lock.release()
