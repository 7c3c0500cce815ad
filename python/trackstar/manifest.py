"""The one file that says what a store holds, replaced as a whole at every commit."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

FORMAT = 1
NAME = "manifest.json"


class StoreError(Exception):
    """A store that cannot be used as asked: damaged, incomplete, of another version, or of something else."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size in bytes and XXH3-128 checksum of a file."""

    bytes: int
    xxh3: str


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """Examples start ≤ i < stop, in the folder shards/<name>."""

    name: str
    start: int
    stop: int
    files: dict[str, FileRecord]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything committed.

    Attributes:
        identity: what is being built, as JSON values; a build goes on only where it is the same.
        row_shape: (L, d).
        total: examples in the whole corpus.
        correction: record of correction.safetensors, None where there is no correction.
        curvature: records of the files of curvature/, None until it is known.
        shards: committed shards, contiguous from example 0.
    """

    identity: dict[str, Any]
    row_shape: tuple[int, int]
    total: int
    correction: FileRecord | None = None
    curvature: dict[str, FileRecord] | None = None
    shards: tuple[ShardRecord, ...] = ()

    @property
    def committed(self) -> int:
        """Examples in committed shards."""
        return self.shards[-1].stop if self.shards else 0

    @property
    def complete(self) -> bool:
        """Whether every example is in a committed shard."""
        return self.committed == self.total

    def files(self) -> dict[str, FileRecord]:
        """{path below the store: record} of every committed file."""
        files = {} if self.correction is None else {"correction.safetensors": self.correction}
        files |= self.curvature or {}
        for shard in self.shards:
            files |= {f"shards/{shard.name}/{name}": record for name, record in shard.files.items()}
        return files

    def write(self, path: Path) -> None:
        """Commit: replace the manifest in the folder ``path`` atomically and durably."""
        temporary = path / (NAME + ".new")
        content = dataclasses.asdict(self)
        text = _canonical({"format": FORMAT, "checksum": _checksum(content), "content": content})
        with naming(temporary):
            temporary.write_text(text)
            sync(temporary)
            temporary.replace(path / NAME)
            sync(path)

    @staticmethod
    def read(path: Path) -> "Manifest | None":
        """The manifest in the folder ``path``, None where there is none.

        Raises:
            StoreError: it is damaged or of another format version.
        """
        try:
            text = (path / NAME).read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UnicodeDecodeError as error:
            raise StoreError(f"{path / NAME} is damaged: {error}") from None
        try:
            document = json.loads(text)
            if document["format"] != FORMAT:
                raise StoreError(
                    f"{path} is a store of format {document['format']}; this version reads format {FORMAT}"
                )
            fields = document["content"]
            if text != _canonical(document) or document["checksum"] != _checksum(fields):
                raise StoreError(f"{path / NAME} is damaged: it does not match its own checksum")
            shards = tuple(
                ShardRecord(**(shard | {"files": _records(shard["files"])})) for shard in fields.pop("shards")
            )
            correction, curvature = fields.pop("correction"), fields.pop("curvature")
            blocks, size = fields.pop("row_shape")
            manifest = Manifest(
                **fields,
                row_shape=(int(blocks), int(size)),
                correction=None if correction is None else FileRecord(**correction),
                curvature=None if curvature is None else _records(curvature),
                shards=shards,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(f"{path / NAME} is damaged: {error}") from None
        stops = [0, *(shard.stop for shard in shards)]
        if any(shard.start != stop or shard.stop <= stop for shard, stop in zip(shards, stops, strict=False)):
            raise StoreError(f"{path / NAME} is damaged: its shards are not contiguous")
        return manifest


def record_of(file: Path) -> FileRecord:
    """Size and checksum of a file, streamed."""
    digest = xxhash.xxh3_128()
    size = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def records_below(folder: Path) -> dict[str, FileRecord]:
    """{path below ``folder``: record} of its files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): record_of(file) for file in files}


def damage_of(root: Path, name: str, record: FileRecord) -> list[str]:
    """How the file ``root / name`` differs from its record: nothing, or one line."""
    file = root / name
    if not file.is_file():
        return [f"{name} is missing"]
    size = file.stat().st_size
    if size != record.bytes:
        return [f"{name} has {size} bytes instead of {record.bytes}"]
    if record_of(file) != record:
        return [f"{name} does not match its checksum"]
    return []


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, so that it is still there after a power failure."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below ``folder`` to the disk."""
    for entry in folder.rglob("*"):
        sync(entry)
    sync(folder)


def sync(path: Path) -> None:
    """Bring one file's bytes, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a system error of the block that names no file, such as a full disk's, the name ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _canonical(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1)


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _records(fields: dict[str, Any]) -> dict[str, FileRecord]:
    return {name: FileRecord(**record) for name, record in fields.items()}
