"""Reading a store: whitened rows on disk, and everything needed to question them.

    STORE/manifest.json      what is committed (see manifest.py); what it does not vouch for does not exist
    STORE/index/<number>/    the list of shards, where there are many (see index.py)
    STORE/shards/<rows>/     rows and examples (see shard.py)
    STORE/deletions/<number>/  which rows were deleted
    STORE/curvature/         R_train, its eigenvalues, damping and whitener
    STORE/correction/        the optimizer correction that the rows were built with, if any

All folders are sealed and never change (see sealed.py); docs/format.md has the details.
"""

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from trackstar.curvature import Curvature
from trackstar.errors import StoreError
from trackstar.gradients.spec import SketchSpec
from trackstar.optimizer.correction import Correction
from trackstar.storage.index import ShardIndex, index_folders
from trackstar.storage.layout import Layout
from trackstar.storage.manifest import Manifest
from trackstar.storage.sealed import Seal, SealedFolder
from trackstar.storage.shard import Shard

__all__ = ["Store", "StoreError", "open_store"]


class Store:
    """One committed version of a store, opened for reading; :func:`open_store` makes one.

    A store that is added to, or has rows deleted, while this object lives does not change for it. Files are
    memory-mapped shard by shard and let go again, so memory does not grow with the store. The checksum of an
    array is compared before its first row is served.
    """

    def __init__(self, path: Path, manifest: Manifest, *, check: bool = True) -> None:
        self.path = path
        self.manifest = manifest
        self.end = manifest.finished or manifest.committed
        self._check = check

    def __len__(self) -> int:
        """Rows that are not deleted; those committed so far, while the first build goes on."""
        return self.end - len(self.deleted)

    def __repr__(self) -> str:
        blocks, size = self.row_shape
        wide = f" beside {self.wide_dtype}" if self.wide_dtype else ""
        state = "" if self.complete else ", incomplete"
        return f"Store({str(self.path)!r}, {len(self)} rows of {blocks}×{size} {self.dtype}{wide}{state})"

    @property
    def complete(self) -> bool:
        """Whether the work that made the store was ended."""
        return self.manifest.finished > 0

    @property
    def identity(self) -> dict[str, Any]:
        """What was built: spec, model, correction, dtype and so on, as JSON values."""
        return self.manifest.identity

    @property
    def output(self) -> str:
        """What a row is the gradient of: "loss", "margin" or "logit"."""
        return self.identity["output"]

    @property
    def parts(self) -> tuple[dict[str, Any], ...]:
        """{"examples": count, "fingerprint": …} of the corpus of the build, and of every append and merge."""
        return self.manifest.parts_within(self.end)

    @property
    def dtype(self) -> str:
        """Name of the dtype that rows are kept in."""
        return self.layout.dtype

    @property
    def wide_dtype(self) -> str | None:
        """Name of the dtype of the wider copy of the rows, None where there is none."""
        return self.layout.wide

    @property
    def row_shape(self) -> tuple[int, int]:
        """(L, d) of a row."""
        return self.manifest.row_shape

    @functools.cached_property
    def layout(self) -> Layout:
        """How the rows lie on disk."""
        return self.manifest.layout

    @functools.cached_property
    def spec(self) -> SketchSpec:
        """The spec that rows were collected with."""
        try:
            return SketchSpec(**self.identity["spec"])
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"{self.path}: the manifest holds no spec that this version knows: {error}"
            ) from None

    @functools.cached_property
    def correction(self) -> Correction | None:
        """The optimizer correction that rows were collected with, None where there was none.

        Raises:
            StoreError: the build has not come that far, or a file is damaged.
        """
        if self.identity["correction"] is None:
            return None
        folder = self._folder("correction", self.manifest.correction)
        folder.require()
        try:
            return Correction.load(folder.path / "correction.safetensors")
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise folder.error(f"correction/correction.safetensors is no correction: {error}") from None

    @functools.cached_property
    def curvature(self) -> Curvature:
        """R_train and what follows from it, mapped: what of it is not used is not in memory.

        Raises:
            StoreError: the build has not come that far, or a file is damaged.
        """
        folder = self._folder("curvature", self.manifest.curvature)
        folder.require()
        blocks, size = self.row_shape
        arrays = {
            "train": ("float64", (blocks, size, size)),
            "damping": ("float64", (blocks,)),
            "eigenvalues": ("float64", (blocks, size)),
            "whitener": ("float32", (blocks, size, size)),
        }
        # Mapped privately, as torch takes only memory that may be written to.
        tensors = {
            name: torch.from_numpy(folder.array(name, *kind, mode="c")) for name, kind in arrays.items()
        }
        for name in ("damping", "eigenvalues", "whitener"):  # Queries need no more.
            # The extremes pass on NaN, and unlike isfinite() they take no memory.
            if not torch.stack(tensors[name].aminmax()).isfinite().all():
                raise folder.error(f"curvature/{name} holds NaN or infinity")
        if not (tensors["eigenvalues"] > 0).all():
            raise folder.error("curvature/eigenvalues holds numbers that are not positive")
        return Curvature(**tensors, rotated=self.layout.narrow)

    @functools.cached_property
    def shards(self) -> "Shards":
        """The shards in order, each opened when it is asked for."""
        return Shards(self, check=self._check)

    @functools.cached_property
    def deleted(self) -> torch.Tensor:
        """Indices of the deleted rows, int64, ascending."""
        deleted = read_deletions(self.path, self.manifest)
        # A merge that goes on has deletions of rows that are yet to come.
        return torch.from_numpy(deleted[deleted < self.end])

    @property
    def squared_norms(self) -> torch.Tensor:
        """‖y‖² of every row and block before narrowing, (end, L) float32; zeros for deleted rows."""
        parts = [torch.empty(0, self.row_shape[0])]
        for shard in self.shards:
            parts.append(shard.squared_norms.clone())
            parts[-1][shard.deleted] = 0
        return torch.cat(parts)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Whitened rows start ≤ i < stop, (n, L, d) float32, from the widest form kept; zeros for deleted rows.

        Raises:
            IndexError: the range is not within the store.
            StoreError: a shard is damaged.
        """
        if not 0 <= start <= stop <= self.end:
            raise IndexError(f"rows must lie within 0 to {self.end}, got {start} to {stop}")
        parts = [torch.empty(0, *self.row_shape)]
        number = self.shards.find(start)
        while start < stop:
            shard = self.shards[number]
            parts.append(shard.floats(start, min(stop, shard.stop)))
            start, number = shard.stop, number + 1
        return torch.cat(parts)

    def to_numpy(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """:meth:`rows` start ≤ i < stop, all of them by default, as an array (n, L, d) float32.

        Raises:
            IndexError: the range is not within the store.
            StoreError: a shard is damaged.
        """
        return self.rows(start, self.end if stop is None else stop).numpy()

    def indices_of(self, ids: Iterable[str]) -> list[int]:
        """Indices of the rows with these ids, ascending, the deleted ones left out; every id's, if it has several.

        Raises:
            ValueError: there is no row with one of the ids.
        """
        wanted, found, indices = set(ids), set(), []
        for shard in self.shards:
            for position in shard.live.tolist():
                name = shard.id(shard.start + position)
                if name in wanted:
                    found.add(name)
                    indices.append(shard.start + position)
        if wanted - found:
            raise ValueError(f"ids must be of rows of {self.path}, got {min(wanted - found)!r}")
        return indices

    def require_complete(self) -> None:
        """Require the work that makes the store to have been ended.

        Raises:
            StoreError: it was not.
        """
        if not self.complete:
            raise StoreError(f"the store at {self.path} is not complete: run its build again to finish it")

    def text(self, index: int) -> str:
        """The text of example ``index``."""
        return self._shard_of(index).text(index)

    def id(self, index: int) -> str:
        """The id of example ``index``: its own, or its position in the corpus."""
        return self._shard_of(index).id(index)

    def tokens(self, index: int) -> np.ndarray:
        """The token ids (T,) int32 that example ``index`` was built from."""
        return self._shard_of(index).tokens(index)

    def metadata(self, index: int) -> dict[str, Any]:
        """The metadata that example ``index`` came with; empty where there was none."""
        return self._shard_of(index).metadata(index)

    def folders(self) -> list[SealedFolder]:
        """Everything committed but the shards."""
        found = [*index_folders(self.path, self.manifest), *_deletion_folders(self.path, self.manifest)]
        for name, seal in (("correction", self.manifest.correction), ("curvature", self.manifest.curvature)):
            if seal is not None:
                found.append(SealedFolder(self.path, name, seal))
        return found

    def _shard_of(self, index: int) -> Shard:
        if not 0 <= index < self.end:
            raise IndexError(f"index must be from 0 to {self.end - 1}, got {index}")
        shard = self.shards[self.shards.find(index)]
        if index - shard.start in shard.deleted:
            raise IndexError(f"example {index} was deleted")
        return shard

    def _folder(self, name: str, seal: Seal | None) -> SealedFolder:
        if seal is None:
            raise StoreError(
                f"the store at {self.path} is not complete: run its build again; it has no {name} yet"
            )
        return SealedFolder(self.path, name, seal)


class Shards(Sequence[Shard]):
    """The shards of a store, in order; each is opened when it is asked for and let go with its object."""

    def __init__(self, store: Store, *, check: bool) -> None:
        self._store = store
        self._index = ShardIndex(store.path, store.manifest, store.end)
        # Eight bits a shard, one for each array whose checksum has been compared.
        self._checked = bytearray(b"\0" if check else b"\xff") * len(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Shard:  # type: ignore[override]
        record = self._index[number]
        store = self._store
        low, high = torch.searchsorted(store.deleted, torch.tensor([record.start, record.stop])).tolist()
        deleted = store.deleted[low:high] - record.start
        checked = memoryview(self._checked)[number : number + 1]
        return Shard(store.path, record, store.layout, deleted, checked)

    @property
    def records(self) -> ShardIndex:
        """Rows and seals of the shards, without opening any."""
        return self._index

    def find(self, row: int) -> int:
        """Number of the shard that holds ``row``."""
        return self._index.find(row)


def read_deletions(path: Path, manifest: Manifest) -> np.ndarray:
    """Indices of the rows that a manifest says are deleted, int64, ascending.

    Raises:
        StoreError: a file is damaged.
    """
    if not manifest.deletions:
        return np.zeros(0, np.int64)
    parts = []
    for (count, _), folder in zip(manifest.deletions, _deletion_folders(path, manifest), strict=True):
        folder.require()
        rows = np.array(folder.array("rows", "int64", (count,)))
        if rows.min() < 0 or rows.max() >= manifest.total:
            raise folder.error(f"{folder.name}/rows names rows that are not in the store")
        parts.append(rows)
    return np.unique(np.concatenate(parts))


def _deletion_folders(path: Path, manifest: Manifest) -> list[SealedFolder]:
    return [
        SealedFolder(path, f"deletions/{number:08d}", seal)
        for number, (_, seal) in enumerate(manifest.deletions)
    ]


def open_store(path: str | os.PathLike[str], *, check: bool = True) -> Store:
    """Open a store for reading.

    Args:
        path: the store's folder.
        check: compare each array's checksum before its first use.

    Raises:
        FileNotFoundError: there is no store at ``path``.
        StoreError: its manifest is damaged or of another format version.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    if manifest is None:
        raise FileNotFoundError(f"there is no store at {path} (no manifest.json)")
    return Store(path, manifest, check=check)
