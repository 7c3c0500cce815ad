"""The one file that says what a store holds, replaced as a whole at every commit."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any, Self

import xxhash

from trackstar.errors import StoreError
from trackstar.storage.durable import replace_file
from trackstar.storage.layout import CODES, WIDE, Layout
from trackstar.storage.sealed import Seal

FORMAT = 4
NAME = "manifest.json"

SEGMENT = 1024
"""Shards that the manifest lists itself before they move to a folder of the index."""

_HEADER = re.compile(rb'\{\s*"format":\s*(\d{1,9}),')
_DOCUMENT = re.compile(rb'\{"format":%d,"xxh3":"([0-9a-f]{32})","content":(.*)\}\n' % FORMAT, re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """Rows start ≤ i < stop, in a sealed folder."""

    start: int
    stop: int
    seal: Seal

    @property
    def path(self) -> str:
        """The folder, below the store's."""
        return self.path_of(self.start, self.stop)

    @staticmethod
    def path_of(start: int, stop: int) -> str:
        """Where rows start ≤ i < stop go, below the store's folder."""
        return f"shards/{start:010d}-{stop:010d}"


@dataclasses.dataclass(frozen=True)
class Segment:
    """:data:`SEGMENT` shards, the last of which ends at row ``stop``, listed in a sealed folder of the index."""

    stop: int
    seal: Seal


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything committed.

    Attributes:
        identity: what the rows are, as JSON values; work on a store goes on only where it is the same.
        row_shape: (L, d).
        parts: {"examples": count, "fingerprint": …} of the corpus of the build, and of every append and merge.
        total: rows that the work that was begun last will have brought the store to.
        finished: rows that the work that was ended last brought it to; 0 in a store whose build goes on. Rows
            beyond are committed, to be gone on from, and not yet part of the store.
        correction: seal of correction/, None where there is none, or none yet.
        curvature: seal of curvature/, None until it is known.
        segments: the index: the first shards of the store, SEGMENT by SEGMENT.
        shards: the other ones, fewer than SEGMENT.
        deletions: (rows, seal) of each folder of deletions/.
    """

    identity: dict[str, Any]
    row_shape: tuple[int, int]
    parts: tuple[dict[str, Any], ...]
    total: int
    finished: int = 0
    correction: Seal | None = None
    curvature: Seal | None = None
    segments: tuple[Segment, ...] = ()
    shards: tuple[ShardRecord, ...] = ()
    deletions: tuple[tuple[int, Seal], ...] = ()

    @property
    def committed(self) -> int:
        """Rows in committed shards."""
        ends = self.shards or self.segments
        return ends[-1].stop if ends else 0

    @property
    def layout(self) -> Layout:
        """How the rows lie on disk."""
        return Layout(self.identity["dtype"], self.identity["wide"], *self.row_shape)

    def parts_within(self, rows: int) -> tuple[dict[str, Any], ...]:
        """The parts that end at or before row ``rows``."""
        ends = itertools.accumulate(part["examples"] for part in self.parts)
        return tuple(part for part, end in zip(self.parts, ends, strict=True) if end <= rows)

    def write(self, path: Path) -> None:
        """Commit: replace the manifest in the folder ``path`` atomically and durably."""
        content = json.dumps(self._as_json(), separators=(",", ":")).encode()
        digest = xxhash.xxh3_128_hexdigest(content)
        document = b'{"format":%d,"xxh3":"%s","content":%s}\n' % (FORMAT, digest.encode(), content)
        replace_file(path / NAME, document)

    @classmethod
    def read(cls, path: Path) -> "Self | None":
        """The manifest in the folder ``path``, None where there is none.

        Raises:
            StoreError: it is damaged or of another format version.
        """
        try:
            document = (path / NAME).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        header = _HEADER.match(document)
        if header is not None and int(header[1]) != FORMAT:
            raise StoreError(
                f"{path} is a store of format {int(header[1])}; this version reads format {FORMAT}"
            )
        found = _DOCUMENT.fullmatch(document)
        if found is None or found[1].decode() != xxhash.xxh3_128_hexdigest(found[2]):
            raise StoreError(f"{path / NAME} is damaged: it does not match its own checksum")
        try:
            return cls._from_json(json.loads(found[2]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StoreError(f"{path / NAME} is damaged: {error!r}") from None

    def _as_json(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "row_shape": self.row_shape,
            "parts": self.parts,
            "total": self.total,
            "finished": self.finished,
            "correction": self.correction and self.correction.as_list(),
            "curvature": self.curvature and self.curvature.as_list(),
            "segments": [[segment.stop, *segment.seal.as_list()] for segment in self.segments],
            "shards": [[shard.stop, *shard.seal.as_list()] for shard in self.shards],
            "deletions": [[rows, *seal.as_list()] for rows, seal in self.deletions],
        }

    @classmethod
    def _from_json(cls, fields: dict[str, Any]) -> Self:
        identity, parts = fields["identity"], tuple(fields["parts"])
        if identity["dtype"] not in CODES or identity["wide"] not in (None, *WIDE):
            raise ValueError(f"unknown dtype {identity['dtype']!r} or {identity['wide']!r}")
        blocks, size = (_count(value, 1) for value in fields["row_shape"])
        segments = _stops(fields["segments"], 0)
        shards = _stops(fields["shards"], segments[-1][0] if segments else 0)
        starts = [segments[-1][0] if segments else 0, *(stop for stop, _ in shards)]
        manifest = cls(
            identity,
            (blocks, size),
            parts,
            _count(fields["total"], 1),
            _count(fields["finished"]),
            None if fields["correction"] is None else Seal.from_list(fields["correction"]),
            None if fields["curvature"] is None else Seal.from_list(fields["curvature"]),
            tuple(Segment(stop, seal) for stop, seal in segments),
            tuple(ShardRecord(start, *shard) for start, shard in zip(starts, shards, strict=False)),
            tuple((_count(rows, 1), Seal.from_list(seal)) for rows, *seal in fields["deletions"]),
        )
        if sum(_count(part["examples"]) for part in parts) != manifest.total:
            raise ValueError(f"the parts are not {manifest.total} examples")
        if not manifest.finished <= manifest.committed <= manifest.total:
            raise ValueError(
                f"{manifest.finished}, {manifest.committed} and {manifest.total} rows do not fit"
            )
        return manifest


def _count(value: Any, minimum: int = 0) -> int:
    if type(value) is not int or not minimum <= value < 2**63:
        raise ValueError(f"{value!r} is not a number of at least {minimum}")
    return value


def _stops(entries: Any, start: int) -> list[tuple[int, Seal]]:
    """(stop, seal) of [stop, bytes, checksum], each stop beyond the one before."""
    found = []
    for stop, *rest in entries:
        found.append((_count(stop, start + 1), Seal.from_list(rest)))
        start = stop
    return found
