"""Files and folders that appear whole or not at all, and are still there after a power failure."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_SMALL_FILES = 256 << 10
"""Disk for the small files of a new folder, and for the last, half-filled block of each file."""


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
            _reserve(temporary, size + _SMALL_FILES)
            yield temporary
            sync_tree(temporary)
            temporary.rename(final)
    except BaseException:
        # The error that ended the block is the one to tell; what cannot be removed now is replaced next time.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(final.parent)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """A temporary name that becomes the file ``final``, durably and atomically, if the block ends without an error.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    make_folder(final.parent)
    temporary = final.with_name(final.name + ".new")
    try:
        with naming(temporary):
            yield temporary
            sync(temporary)
            temporary.replace(final)
            sync(final.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(file: Path, content: bytes) -> None:
    """Replace a file atomically and durably.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    temporary = file.with_name(file.name + ".new")
    with naming(temporary):
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(file)
        sync(file.parent)


def link(source: Path, target: Path) -> None:
    """Give a file that never changes a second name, or a copy where the file systems do not allow that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
        shutil.copyfile(source, target)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, so that it is still there after a power failure."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder and all it holds, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def require_disk(path: Path, needed: int, task: str) -> None:
    """Require that the disk of ``path``, which need not exist yet, has ``needed`` bytes free.

    Raises:
        OSError: it has less; the message says how much ``task`` needs.
    """
    free = shutil.disk_usage(nearest_folder(path)).free
    if free < needed:
        message = f"{task} needs {needed / 1e6:,.1f} MB of disk, {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, message, str(path))


def nearest_folder(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


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


def _reserve(folder: Path, size: int) -> None:
    probe = folder / "reservation"
    with probe.open("wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif shutil.disk_usage(folder).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(
                error.errno, f"cannot reserve {size / 1e6:.1f} MB: {error.strerror}", str(folder)
            ) from None
        finally:
            probe.unlink()
