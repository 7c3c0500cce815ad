"""The C library's heap, as far as it decides how much memory a build takes."""

import ctypes
import sys

LARGE = 1 << 20
"""Bytes of a block that is mapped by itself."""

_MMAP_THRESHOLD = -3
"""glibc's M_MMAP_THRESHOLD."""


def give_back_large_blocks() -> None:
    """Have memory that is freed go back to the system, block by block, for the rest of this process.

    glibc keeps blocks of up to 32 MB for later use, in pieces between what is still in use. A pass over a model of
    many layers then ends up with a quarter more than it ever needs at a time, for good. Mapping every large
    block by itself costs a build some 2% of its time. For commands, that own their process; elsewhere than on glibc
    nothing is done.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, LARGE)


def give_back_free_pages() -> None:
    """Have the memory that is free now go back to the system: after work in smaller blocks than what follows."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
