"""Reading a store: whitened rows on disk, and everything needed to question them.

    STORE/manifest.json            what is committed: identity, shards, sizes and checksums (see manifest.py)
    STORE/curvature/<name>/        R_train, its eigenvalues, damping and whitener
    STORE/correction.safetensors   the optimizer correction that the rows were built with, if any
    STORE/shards/<first>-<end>/    rows, squared_norms, tokens, text and ids of examples first ≤ i < end

Every array is an mmap_ninja folder. Shards are immutable; what the manifest does not name does not exist.
"""

import bisect
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mmap_ninja import numpy as np_ninja
from mmap_ninja.ragged import RaggedMmap
from mmap_ninja.string import StringsMmap

from trackstar.correction import Correction
from trackstar.curvature import Curvature
from trackstar.manifest import FileRecord, Manifest, ShardRecord, StoreError, damage_of
from trackstar.spec import SketchSpec

CURVATURE_ARRAYS = ("train", "damping", "eigenvalues", "whitener")


class Store:
    """A store opened for reading; :func:`open_store` makes one.

    Files are memory-mapped shard by shard and let go again, so memory does not grow with the store. The
    checksum of a shard is compared before its first row is served.
    """

    def __init__(self, path: Path, manifest: Manifest, *, check: bool = True) -> None:
        self.path = path
        self._manifest = manifest
        self._check = check
        self._checked: set[str] = set()
        self._starts = [shard.start for shard in manifest.shards]

    def __len__(self) -> int:
        """Rows committed so far."""
        return self._manifest.committed

    def __repr__(self) -> str:
        blocks, size = self.row_shape
        state = "" if self.complete else ", incomplete"
        return f"Store({str(self.path)!r}, {len(self)} rows of {blocks}×{size} {self.dtype}{state})"

    @property
    def complete(self) -> bool:
        """Whether the build that made the store has finished."""
        return self._manifest.complete

    @property
    def identity(self) -> dict[str, object]:
        """What was built: spec, model, data, correction and dtype, as JSON values."""
        return self._manifest.identity

    @property
    def dtype(self) -> str:
        """Name of the dtype that rows are kept in."""
        return str(self._manifest.identity["dtype"])

    @property
    def row_shape(self) -> tuple[int, int]:
        """(L, d) of a row."""
        return self._manifest.row_shape

    @property
    def shards(self) -> list[ShardRecord]:
        """The committed shards, in order."""
        return list(self._manifest.shards)

    @functools.cached_property
    def spec(self) -> SketchSpec:
        """The spec that rows were collected with."""
        return SketchSpec(**self._manifest.identity["spec"])

    @functools.cached_property
    def correction(self) -> Correction | None:
        """The optimizer correction that rows were collected with, None where there was none."""
        if self._manifest.correction is None:
            return None
        self._require_intact({"correction.safetensors": self._manifest.correction})
        return Correction.load(self.path / "correction.safetensors")

    @functools.cached_property
    def curvature(self) -> Curvature:
        """R_train and what follows from it.

        Raises:
            StoreError: the build has not come that far, or a file is damaged.
        """
        if self._manifest.curvature is None:
            raise StoreError(f"{self.path}: the store has no curvature yet; run the build again to finish it")
        self._require_intact(self._manifest.curvature)
        arrays = {
            name: torch.from_numpy(np.array(np_ninja.open_existing(self.path / "curvature" / name)))
            for name in CURVATURE_ARRAYS
        }
        return Curvature(**arrays)

    @property
    def squared_norms(self) -> torch.Tensor:
        """‖y‖² of every row and block before narrowing, (N, L) float32."""
        parts = [torch.from_numpy(np.array(self._array(shard, "squared_norms"))) for shard in self.shards]
        return torch.cat(parts)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Whitened rows start ≤ i < stop, (n, L, d) float32.

        Raises:
            IndexError: the range is not within the store.
            StoreError: a shard is damaged.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows must lie within 0 to {len(self)}, got {start} to {stop}")
        parts = [torch.empty(0, *self.row_shape)]
        for shard in self.shards:
            low, high = max(start, shard.start), min(stop, shard.stop)
            if low < high:
                rows = self._array(shard, "rows")[low - shard.start : high - shard.start]
                parts.append(torch.from_numpy(np.array(rows)).float())
        return torch.cat(parts)

    def scan(self) -> Iterator[tuple[ShardRecord, torch.Tensor, torch.Tensor]]:
        """Each shard, its rows (n, L, d) in the store's dtype and squared norms (n, L), mapped, not copied.

        Raises:
            StoreError: a shard is damaged.
        """
        for shard in self.shards:
            # Mapped copy-on-write: torch takes only arrays it may write to, and nothing here ever writes.
            rows = torch.from_numpy(self._array(shard, "rows", mode="c"))
            norms = torch.from_numpy(self._array(shard, "squared_norms", mode="c"))
            yield shard, rows, norms

    def text(self, index: int) -> str:
        """The text of example ``index``."""
        return self._string(index, "text")

    def id(self, index: int) -> str:
        """The id of example ``index``: its own, or its position in the corpus."""
        return self._string(index, "ids")

    def tokens(self, index: int) -> np.ndarray:
        """The token ids (T,) int32 that example ``index`` was built from."""
        shard = self._shard_of(index)
        ragged = RaggedMmap(self._folder(shard, "tokens"), mode="r")
        return np.array(ragged[index - shard.start], dtype=np.int32)

    def damage(self) -> list[str]:
        """What is wrong with the store's files, one line each; reads every byte. Empty: all is well."""
        return [
            line
            for name, record in self._manifest.files().items()
            for line in damage_of(self.path, name, record)
        ]

    def _string(self, index: int, name: str) -> str:
        shard = self._shard_of(index)
        strings = StringsMmap(self._folder(shard, name), mode="rb")
        try:
            return strings[index - shard.start]
        finally:
            strings.close()

    def _shard_of(self, index: int) -> ShardRecord:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}")
        return self._manifest.shards[bisect.bisect_right(self._starts, index) - 1]

    def _folder(self, shard: ShardRecord, name: str) -> Path:
        """The folder of one of a shard's arrays, once the shard's checksums have been compared."""
        if self._check and shard.name not in self._checked:
            self._require_intact(
                {f"shards/{shard.name}/{file}": record for file, record in shard.files.items()}
            )
            self._checked.add(shard.name)
        folder = self.path / "shards" / shard.name / name
        # mmap_ninja makes the folders that it is to open where they are missing.
        if not folder.is_dir():
            raise StoreError(f"{self.path}: shards/{shard.name}/{name} is missing")
        return folder

    def _array(self, shard: ShardRecord, name: str, mode: str = "r") -> np.ndarray:
        return np_ninja.open_existing(self._folder(shard, name), mode=mode)

    def _require_intact(self, files: dict[str, FileRecord]) -> None:
        for name, record in files.items():
            for line in damage_of(self.path, name, record):
                raise StoreError(f"{self.path}: {line}; nothing is served from it")


def open_store(path: str | os.PathLike[str], *, check: bool = True) -> Store:
    """Open a store for reading.

    Args:
        path: the store's folder.
        check: compare each shard's checksum before its first use.

    Raises:
        FileNotFoundError: there is no store at ``path``.
        StoreError: its manifest is damaged or of another format version.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    if manifest is None:
        raise FileNotFoundError(f"there is no store at {path} (no manifest.json)")
    return Store(path, manifest, check=check)
