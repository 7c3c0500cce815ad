"""Putting arrays into a store so that each folder appears whole or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash
from mmap_ninja import numpy as np_ninja
from mmap_ninja.ragged import RaggedMmap
from mmap_ninja.string import StringsMmap
from safetensors import SafetensorError

from trackstar.correction import Correction
from trackstar.curvature import Curvature
from trackstar.examples import Encoded
from trackstar.manifest import (
    FileRecord,
    ShardRecord,
    StoreError,
    make_folder,
    naming,
    record_of,
    records_below,
    sync,
    sync_tree,
)
from trackstar.store import CURVATURE_ARRAYS

_SENTINEL = "\n"
"""Ends every ragged array: a memory map cannot be empty, but all texts of a shard can."""

_SMALL_FILES = 512 << 10
"""Disk for mmap_ninja's shapes and dtypes, and for the last, half-filled block of a shard's 60 files."""


@contextlib.contextmanager
def new_folder(final: Path, size: int) -> Iterator[Path]:
    """A temporary folder that becomes ``final``, durably and atomically, if the block ends without an error.

    Whatever stands at ``final`` was never committed and is replaced. The disk for ``size`` bytes is reserved
    first: a memory map that runs out of disk kills the process, a reservation raises.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    temporary = final.with_name(final.name + ".new")
    for leftover in (temporary, final):
        remove_folder(leftover)
    make_folder(final.parent)
    temporary.mkdir()
    try:
        with naming(temporary):
            _require_space(temporary, size + _SMALL_FILES)
            yield temporary
            sync_tree(temporary)
            temporary.rename(final)
    except BaseException:
        # The error that ended the block is the one to tell; what cannot be removed now is replaced next time.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(final.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder and all it holds, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def write_staged(final: Path, rows: np.ndarray) -> None:
    """Keep rows (n, L, d) float32 that are still to be whitened, with their checksum."""
    with new_folder(final, rows.nbytes) as folder:
        np_ninja.from_ndarray(folder / "rows", rows)
        (folder / "checksum").write_text(_checksum_below(folder / "rows"))


def read_staged(folder: Path) -> np.ndarray:
    """Rows (n, L, d) float32 that :func:`write_staged` left.

    Raises:
        StoreError: they are damaged.
    """
    if (folder / "checksum").read_text() != _checksum_below(folder / "rows"):
        raise StoreError(f"{folder} does not match its checksum: remove it and run the build again")
    return np_ninja.open_existing(folder / "rows", mode="c")


def write_shard(
    root: Path, start: int, examples: Sequence[Encoded], codes: np.ndarray, squared_norms: np.ndarray
) -> ShardRecord:
    """Write the shard of ``examples``, the first of them number ``start``; a manifest has yet to name it."""
    stop = start + len(examples)
    name = f"{start:010d}-{stop:010d}"
    texts = [example.text for example in examples]
    with new_folder(
        root / "shards" / name, shard_bytes(examples, codes.nbytes + squared_norms.nbytes)
    ) as folder:
        np_ninja.from_ndarray(folder / "rows", codes)
        np_ninja.from_ndarray(folder / "squared_norms", squared_norms)
        tokens = [example.tokens for example in examples]
        RaggedMmap.from_lists(folder / "tokens", [*tokens, np.zeros(1, np.int32)], dtype=np.int32)
        StringsMmap.from_strings(folder / "text", [*texts, _SENTINEL]).close()
        StringsMmap.from_strings(folder / "ids", [*(example.id for example in examples), _SENTINEL]).close()
    return ShardRecord(name, start, stop, records_below(root / "shards" / name))


def shard_bytes(examples: Sequence[Encoded], row_bytes: int) -> int:
    """Bytes of a shard's files, up to the handful that mmap_ninja spends on shapes and dtypes."""
    ragged = sum(
        4 * len(example) + len(example.text.encode()) + len(example.id.encode()) for example in examples
    )
    # Starts and ends of three ragged arrays, and the tokens' two shapes, 8 bytes each.
    return row_bytes + ragged + 64 * (len(examples) + 1) + 16


def write_curvature(root: Path, curvature: Curvature) -> dict[str, FileRecord]:
    """Write curvature/ and return its records by path below ``root``."""
    arrays: Mapping[str, np.ndarray] = {name: getattr(curvature, name).numpy() for name in CURVATURE_ARRAYS}
    final = root / "curvature"
    with new_folder(final, sum(array.nbytes for array in arrays.values())) as folder:
        for name, array in arrays.items():
            np_ninja.from_ndarray(folder / name, array)
    return {f"curvature/{name}": record for name, record in records_below(final).items()}


def write_correction(root: Path, correction: Correction) -> FileRecord:
    """Write correction.safetensors.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    final = root / "correction.safetensors"
    temporary = final.with_name(final.name + ".new")
    try:
        correction.save(temporary)
    except SafetensorError as error:
        raise OSError(f"cannot write {temporary}: {error}") from None
    with naming(temporary):
        sync(temporary)
        temporary.replace(final)
        sync(root)
    return record_of(final)


def _checksum_below(folder: Path) -> str:
    return xxhash.xxh3_128_hexdigest(repr(records_below(folder)).encode())


def _require_space(folder: Path, size: int) -> None:
    probe = folder / "reservation"
    with probe.open("wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
            elif shutil.disk_usage(folder).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(
                error.errno, f"cannot reserve {size / 1e6:.1f} MB: {error.strerror}", str(folder)
            ) from None
        finally:
            probe.unlink()
