"""A store's rows as a scan gets them: a bounded piece at a time, read ahead in another thread, let go behind.

Rows stay in the memory map, nothing is copied but rows that lie scattered. The pages of a piece are brought into
memory while the piece before it is scored, and given back as soon as it has been scored itself, so that a scan of a
store of any size keeps two pieces. (The system's cache of the file is left alone: a second scan finds it warm.)

Of rows that are kept twice, as codes and wider, a piece has either form. Beside codes the wider rows can be looked up;
those pages are fetched by whoever touches them.
"""

import contextlib
import ctypes
import functools
import itertools
import mmap
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from trackstar.scoring.selection import Selection, shards_of
from trackstar.storage.shard import Shard
from trackstar.storage.store import Store

LONG_RUN = 4 << 20
"""Bytes of consecutive rows that are worth a piece of their own; what is shorter is copied together."""

READ_STEP = 16 * mmap.PAGESIZE
"""Of so many bytes one is read to bring all into memory: the system maps that much around a page."""


_libc = functools.cache(lambda: ctypes.CDLL(None))


def _madvise(address: int, size: int, advice: int) -> None:
    """Advice that needs not be taken. Unlike :meth:`mmap.mmap.madvise` it keeps no other thread from running Python."""
    _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice))


class Piece:
    """Some rows of a shard, those that a scan wants out of ``first`` ≤ row < ``stop``.

    Attributes:
        rows: (n,) int64, ascending: their numbers in the store.
        codes: (n, L, codes of a block), what the scoring ops take as rows; where the piece is wide, wider ones.
        scales: (n, L) float32, or None.
        squared_norms: (n, L) float32.
        wide: whether ``codes`` are the wider copy.
    """

    def __init__(self, shard: Shard, rows: np.ndarray, wide: bool) -> None:
        self._shard = shard
        self._first, self._stop = int(rows[0]) - shard.start, int(rows[-1]) + 1 - shard.start
        name = "wide" if wide else "rows"
        self._arrays = [name, "squared_norms"] if wide else [name, "scales", "squared_norms"]
        self.rows = torch.from_numpy(rows)
        self.wide = wide
        self.consecutive = len(rows) == self._stop - self._first
        where = slice(self._first, self._stop) if self.consecutive else self.rows - shard.start
        codes, squared_norms = shard.unchecked_rows(name), shard.squared_norms
        scales = None if wide else shard.scales
        if self.consecutive and hasattr(mmap, "MADV_WILLNEED"):
            self._advise(mmap.MADV_WILLNEED)
        shard.compare(name, self._first, self._stop)
        self.codes = codes[where]
        self.scales = None if scales is None else scales[where]
        self.squared_norms = squared_norms[where]
        if self.consecutive:
            self._fetch()
        else:
            self.release()

    def __len__(self) -> int:
        return len(self.rows)

    def look_up(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Wider rows beside the codes (m, L, d), mapped, and which of them the piece's are, None for all in order.

        Raises:
            StoreError: they are damaged.
        """
        wide = self._shard.wide
        if wide is None:
            raise self._shard.folder.error(f"{self._shard.folder.name} has no wider rows")
        if "wide" not in self._arrays:
            self._arrays.append("wide")
        places = None if self.consecutive else self.rows - (self._shard.start + self._first)
        return wide[self._first : self._stop], places

    def release(self) -> None:
        """Give the pages of the map back; to read them again is to fetch them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._advise(mmap.MADV_DONTNEED)

    def _advise(self, advice: int) -> None:
        """Tell the system what to do with the pages."""
        for array, start, stop in self._mapped():
            # The first page holds the end of the row before as well, which has been scored; the last page belongs
            # to the next piece.
            start, stop = (offset // mmap.PAGESIZE * mmap.PAGESIZE for offset in (start, stop))
            if start < stop:
                _madvise(array.ctypes.data + start, stop - start, advice)

    def _fetch(self) -> None:
        for array, start, stop in self._mapped():
            array.reshape(-1).view(np.uint8)[start:stop:READ_STEP].max()

    def _mapped(self) -> Iterator[tuple[np.memmap, int, int]]:
        """Each array and the bytes of it that hold the piece."""
        for name in self._shard.layout.row_arrays:
            if name in self._arrays:
                array = self._shard.mapped(name)
                yield array, self._first * array.strides[0], self._stop * array.strides[0]


@contextlib.contextmanager
def read_pieces(
    store: Store, chosen: Selection, size: int, wide: Callable[[], bool]
) -> Generator[Iterator[Piece]]:
    """The chosen rows in pieces of at most ``size``; shards that hold none of them are not opened.

    The first is read from the moment that the context is entered. A piece is valid until the next one is asked for.
    What was found in pieces counts only once the last one has been asked for and there was none: the rows of a
    shard are compared with their checksum while they are read.

    Args:
        store: the store.
        chosen: the rows.
        size: most rows of a piece.
        wide: whether the next piece is to hold the wider rows; asked when it is about to be read.

    Raises:
        StoreError: a shard is damaged.
    """
    pieces = _pieces(store, chosen, size, wide)

    def read(done: "Piece | None") -> "Piece | None":
        if done is not None:
            done.release()
        return next(pieces, None)

    with ThreadPoolExecutor(1, "trackstar-read") as reader:

        def ahead(coming: "Future[Piece | None]") -> Iterator[Piece]:
            done = None
            while (piece := coming.result()) is not None:
                coming = reader.submit(read, done)
                yield piece
                done = piece

        yield ahead(reader.submit(read, None))


def _pieces(store: Store, chosen: Selection, size: int, wide: Callable[[], bool]) -> Iterator[Piece]:
    """Those of :func:`read_pieces`."""
    shards = shards_of(store, chosen)
    coming = next(shards, None)
    while (shard := coming) is not None:
        coming = next(shards, None)
        runs = list(_runs(shard, chosen, size))
        for run in runs:
            piece = Piece(shard, run, wide())
            if run is runs[-1] and coming is not None:
                # While there is time: a shard's first piece takes longest.
                coming.open_rows(wide=piece.wide)
            yield piece
        shard.end_comparisons()


def _runs(shard: Shard, chosen: Selection, size: int) -> Iterator[np.ndarray]:
    """The rows of each piece."""
    long_run = -(-LONG_RUN // shard.layout.row_bytes)
    count = -(-len(shard) // size)
    bounds = [shard.start + len(shard) * i // count for i in range(count + 1)]
    for start, stop in itertools.pairwise(bounds):
        runs = [np.arange(*run) for run in chosen.within(start, stop)]
        scattered = [run for run in runs if len(run) < long_run and len(runs) > 1]
        if scattered:
            yield np.concatenate(scattered)
        yield from (run for run in runs if len(run) >= long_run or len(runs) == 1)
