"""Folders of arrays that one checksum vouches for, and that never change.

A sealed folder holds, beside its files, ``checksums.json``: {file: [bytes, XXH3-128]}. Its seal is the number of
bytes of all its files and the XXH3-128 of ``checksums.json``; whoever has the seal can tell whether any file of the
folder is as it was written, and reads no file but those that are needed.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import xxhash
from mmap_ninja import numpy as np_ninja

from trackstar.errors import DamageError
from trackstar.storage.durable import link, new_folder

CHECKSUMS = "checksums.json"

_HEX = re.compile(r"[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True)
class Seal:
    """What vouches for a sealed folder: bytes of its files, and XXH3-128 of its ``checksums.json``."""

    bytes: int
    xxh3: str

    def as_list(self) -> list[Any]:
        """The seal as JSON values."""
        return [self.bytes, self.xxh3]

    @staticmethod
    def from_list(value: Any) -> "Seal":
        """The seal that :meth:`as_list` gave.

        Raises:
            ValueError: it is none.
        """
        if not (isinstance(value, list) and len(value) == 2 and _is_count(value[0]) and _is_digest(value[1])):
            raise ValueError(f"{value!r} is not a size and a checksum")
        return Seal(*value)


def seal(folder: Path) -> Seal:
    """Write ``checksums.json`` over the files below ``folder``, which are complete."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    records = {file.relative_to(folder).as_posix(): checksum(file) for file in files}
    text = json.dumps(records, separators=(",", ":")).encode()
    (folder / CHECKSUMS).write_bytes(text)
    return Seal(sum(size for size, _ in records.values()) + len(text), xxhash.xxh3_128_hexdigest(text))


def share(folder: "SealedFolder", root: Path, name: str | None = None) -> Seal:
    """Put a sealed folder also below ``root``, under its own name or another; its files are shared where they can be.

    Raises:
        DamageError: a file is missing.
        OSError: the disk is full or cannot be written.
    """
    with new_folder(root / (name or folder.name), 0) as new:
        folder.link(new)
    return folder.seal


def checksum(file: Path) -> tuple[int, str]:
    """Size and XXH3-128 of a file, streamed."""
    digest = xxhash.xxh3_128()
    size = 0
    buffer = memoryview(bytearray(1 << 18))  # stays in cache between reading and hashing
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return size, digest.hexdigest()


class SealedFolder:
    """The sealed folder ``root / name``, opened for reading."""

    def __init__(self, root: Path, name: str, seal: Seal) -> None:
        self.root = root
        self.name = name
        self.seal = seal

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.root / self.name

    @functools.cached_property
    def checksums(self) -> dict[str, tuple[int, str]]:
        """{file: (bytes, XXH3-128)} of all files but ``checksums.json`` itself.

        Raises:
            DamageError: they are not what the seal vouches for.
        """
        file = f"{self.name}/{CHECKSUMS}"
        try:
            text = (self.path / CHECKSUMS).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise self.error(f"{file} is missing") from None
        if xxhash.xxh3_128_hexdigest(text) != self.seal.xxh3:
            raise self.error(f"{file} does not match its checksum")
        try:
            fields = json.loads(text)
            records = {str(name): (size, digest) for name, (size, digest) in fields.items()}
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise self.error(f"{file} is not a list of checksums") from None
        if not all(
            _is_below(name) and _is_count(size) and _is_digest(digest)
            for name, (size, digest) in records.items()
        ):
            raise self.error(f"{file} is not a list of checksums")
        return records

    def damage(self, below: str = "") -> list[str]:
        """How the files whose names begin with ``below`` differ from what was written, one line each."""
        try:
            records = self.checksums
        except DamageError as error:
            return [error.line]
        return [
            line
            for name, record in records.items()
            if name.startswith(below)
            for line in self._damage_of(name, record)
        ]

    def require(self, below: str = "") -> None:
        """Require the files whose names begin with ``below`` to be as they were written.

        Raises:
            DamageError: one is damaged; it is named.
        """
        for line in self.damage(below):
            raise self.error(line)

    def link(self, folder: Path, below: str = "") -> None:
        """Give the files whose names begin with ``below`` second names, or copies, in another folder.

        Raises:
            DamageError: one is missing.
        """
        for name in (*self.checksums, CHECKSUMS):
            if name.startswith(below):
                try:
                    link(self.path / name, folder / name)
                except FileNotFoundError:
                    raise self.error(f"{self.name}/{name} is missing") from None

    def array(self, name: str, dtype: str, shape: Sequence[int | None], mode: str = "r") -> np.memmap:
        """The array ``name`` mapped; its bytes are not compared with their checksum (see :meth:`require`).

        Args:
            name: the mmap_ninja folder of the array.
            dtype: numpy's name of the dtype that it must have.
            shape: the shape that it must have; None where an axis may have any length.
            mode: "r", or "c" for a private copy of what is written to.

        Raises:
            DamageError: it is missing or of another dtype, shape or size.
        """
        folder = self.path / name
        # mmap_ninja makes the folders that it is to open where they are missing, and trusts what they say.
        try:
            found = tuple(np.frombuffer((folder / "shape.ninja").read_bytes(), "<u8").tolist())
            kind = [(folder / f"{field}.ninja").read_bytes() for field in ("type", "dtype", "order")]
            size = (folder / "data.ninja").stat().st_size
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise self.error(f"{self.name}/{name} is missing") from None
        except ValueError:
            raise self.error(f"{self.name}/{name}/shape.ninja is not a shape") from None
        wanted = tuple(length if want is None else want for want, length in zip(shape, found, strict=False))
        if len(found) != len(shape) or found != wanted or kind != [b"numpy", dtype.encode(), b"C"]:
            raise self.error(f"{self.name}/{name} is not an array of {dtype} of shape {_written(shape)}")
        bytes_wanted = np.dtype(dtype).itemsize
        for length in found:
            bytes_wanted *= length
        if size != bytes_wanted or size == 0:
            raise self.error(f"{self.name}/{name}/data.ninja has {size} bytes instead of {bytes_wanted}")
        try:
            return np_ninja.open_existing(folder, mode=mode)
        except ValueError as error:  # It has become shorter since.
            raise self.error(f"{self.name}/{name} cannot be mapped: {error}") from None

    def _damage_of(self, name: str, record: tuple[int, str]) -> list[str]:
        """How one file differs from its record: nothing, or one line."""
        file, (size, _) = self.path / name, record
        if not file.is_file():
            return [f"{self.name}/{name} is missing"]
        found = file.stat().st_size
        if found != size:
            return [f"{self.name}/{name} has {found} bytes instead of {size}"]
        if checksum(file) != record:
            return [f"{self.name}/{name} does not match its checksum"]
        return []

    def error(self, line: str) -> DamageError:
        """What to raise where a file of the folder is not what it should be."""
        return DamageError(self.root, line)


def _is_below(name: str) -> bool:
    """Whether a name stays in the folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None


def _written(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("any" if length is None else str(length) for length in shape) + ")"
