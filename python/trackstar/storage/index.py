"""The shards of a store in order, however many: a manifest stays small, and a shard is found without reading all.

The manifest lists the last shards itself. Whenever there are SEGMENT of them, they move to a folder of their own,
index/<number>/shards: (SEGMENT, 4) uint64, for each shard its stop, its bytes and the two halves of its checksum.
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from mmap_ninja import numpy as np_ninja

from trackstar.storage.durable import new_folder
from trackstar.storage.manifest import SEGMENT, Manifest, Segment, ShardRecord
from trackstar.storage.sealed import Seal, SealedFolder, seal

_HALF = (1 << 64) - 1


class ShardIndex(Sequence[ShardRecord]):
    """Records of the shards that end at or before row ``stop``."""

    def __init__(self, root: Path, manifest: Manifest, stop: int) -> None:
        self._root = root
        self._segments = manifest.segments
        self._stops = [segment.stop for segment in manifest.segments if segment.stop <= stop]
        self._segment = functools.lru_cache(maxsize=2)(self._read)
        whole = len(self._stops)
        last = self._read(whole) if whole < len(self._segments) else manifest.shards
        self._last = [record for record in last if record.stop <= stop]

    def __len__(self) -> int:
        return len(self._stops) * SEGMENT + len(self._last)

    def __getitem__(self, number: int) -> ShardRecord:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(f"shard must be from 0 to {len(self) - 1}, got {number}")
        return self._records(number // SEGMENT)[number % SEGMENT]

    def find(self, row: int) -> int:
        """Number of the shard that holds ``row``; the number of shards, where none does."""
        segment = bisect.bisect_right(self._stops, row)
        stops = [record.stop for record in self._records(segment)]
        return segment * SEGMENT + bisect.bisect_right(stops, row)

    def _records(self, segment: int) -> list[ShardRecord]:
        return self._segment(segment) if segment < len(self._stops) else self._last

    def _read(self, segment: int) -> list[ShardRecord]:
        folder = _folder(self._root, segment, self._segments[segment].seal)
        folder.require()
        start = self._segments[segment - 1].stop if segment else 0
        records = []
        for stop, size, high, low in folder.array("shards", "uint64", (SEGMENT, 4)).tolist():
            if stop <= start or size >= 1 << 63:
                raise folder.error(f"{folder.name}/shards is not a list of shards")
            records.append(ShardRecord(start, stop, Seal(size, f"{high << 64 | low:032x}")))
            start = stop
        if start != self._segments[segment].stop:
            raise folder.error(f"{folder.name}/shards does not end where the manifest says")
        return records


def with_shard(root: Path, manifest: Manifest, shard: ShardRecord) -> Manifest:
    """The manifest with one more shard, to be committed; the index grows when it is due."""
    shards = (*manifest.shards, shard)
    if len(shards) < SEGMENT:
        return replace(manifest, shards=shards)
    number = len(manifest.segments)
    entries = [
        (record.stop, record.seal.bytes, digest >> 64, digest & _HALF)
        for record in shards
        for digest in [int(record.seal.xxh3, 16)]
    ]
    with new_folder(root / _name(number), 32 * SEGMENT) as folder:
        np_ninja.from_ndarray(folder / "shards", np.array(entries, np.uint64))
        segment = Segment(shard.stop, seal(folder))
    return replace(manifest, segments=(*manifest.segments, segment), shards=())


def without_unfinished(root: Path, manifest: Manifest) -> Manifest:
    """The manifest without the shards beyond ``manifest.finished``, to be committed."""
    index = ShardIndex(root, manifest, manifest.finished)
    whole = len(index) // SEGMENT
    shards = tuple(index[number] for number in range(whole * SEGMENT, len(index)))
    return replace(
        manifest,
        parts=manifest.parts_within(manifest.finished),
        total=manifest.finished,
        segments=manifest.segments[:whole],
        shards=shards,
    )


def index_folders(root: Path, manifest: Manifest) -> list[SealedFolder]:
    """The folders of the index."""
    return [_folder(root, number, segment.seal) for number, segment in enumerate(manifest.segments)]


def _name(number: int) -> str:
    return f"index/{number:08d}"


def _folder(root: Path, number: int, seal: Seal) -> SealedFolder:
    return SealedFolder(root, _name(number), seal)
