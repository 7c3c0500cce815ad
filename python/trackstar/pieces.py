"""A store's rows as a scan gets them: a bounded piece at a time, read ahead in another thread, let go behind.

Rows stay in the memory map, nothing is copied but rows that lie scattered. The pages of a piece are brought into
memory while the piece before it is scored, and given back as soon as it has been scored itself, so that a scan of a
store of any size keeps two pieces. (The system's cache of the file is left alone: a second scan finds it warm.)
"""

import itertools
import mmap
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from trackstar.selection import Selection, shards_of
from trackstar.shard import Shard
from trackstar.store import Store

LONG_RUN = 4 << 20
"""Bytes of consecutive rows that are worth a piece of their own; what is shorter is copied together."""

READ_STEP = 16 * mmap.PAGESIZE
"""Of so many bytes one is read to bring all into memory: the system maps that much around a page."""


class Piece:
    """Some rows of a shard, those that a scan wants out of ``first`` ≤ row < ``stop``.

    Attributes:
        rows: (n,) int64, ascending: their numbers in the store.
        codes: (n, L, codes of a block), what the scoring ops take as rows.
        scales: (n, L) float32, or None.
        squared_norms: (n, L) float32.
    """

    def __init__(self, shard: Shard, rows: np.ndarray) -> None:
        self._shard = shard
        self._first, self._stop = int(rows[0]) - shard.start, int(rows[-1]) + 1 - shard.start
        self.rows = torch.from_numpy(rows)
        consecutive = len(rows) == self._stop - self._first
        where = slice(self._first, self._stop) if consecutive else self.rows - shard.start
        self.codes = shard.codes[where]
        self.scales = None if shard.scales is None else shard.scales[where]
        self.squared_norms = shard.squared_norms[where]
        if consecutive:
            self._fetch()
        else:
            self.release()

    def __len__(self) -> int:
        return len(self.rows)

    def release(self) -> None:
        """Give the pages of the map back; to read them again is to fetch them again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for array, start, stop in self._mapped():
            # The first page holds the end of the row before as well, which has been scored; the last page belongs
            # to the next piece.
            start, stop = (offset // mmap.PAGESIZE * mmap.PAGESIZE for offset in (start, stop))
            if start < stop:
                array.base.madvise(mmap.MADV_DONTNEED, start, stop - start)  # type: ignore[union-attr]

    def _fetch(self) -> None:
        for array, start, stop in self._mapped():
            array.reshape(-1).view(np.uint8)[start:stop:READ_STEP].max()

    def _mapped(self) -> Iterator[tuple[np.memmap, int, int]]:
        """Each array and the bytes of it that hold the piece."""
        for name in self._shard.layout.row_arrays:
            if name != "wide":
                array = self._shard.array(name)
                yield array, self._first * array.strides[0], self._stop * array.strides[0]


def read_pieces(store: Store, chosen: Selection, size: int) -> Generator[Piece]:
    """The chosen rows in pieces of at most ``size``; shards that hold none of them are not opened.

    A piece is valid until the next one is asked for.

    Raises:
        StoreError: a shard is damaged.
    """
    pieces = (piece for shard in shards_of(store, chosen) for piece in _pieces(shard, chosen, size))
    with ThreadPoolExecutor(1, "trackstar-read") as reader:
        coming = reader.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = reader.submit(next, pieces, None)
            yield piece
            piece.release()


def _pieces(shard: Shard, chosen: Selection, size: int) -> Iterator[Piece]:
    long_run = -(-LONG_RUN // shard.layout.row_bytes)
    count = -(-len(shard) // size)
    bounds = [shard.start + len(shard) * i // count for i in range(count + 1)]
    for start, stop in itertools.pairwise(bounds):
        runs = [np.arange(*run) for run in chosen.within(start, stop)]
        scattered = [run for run in runs if len(run) < long_run and len(runs) > 1]
        if scattered:
            yield Piece(shard, np.concatenate(scattered))
        for run in runs:
            if len(run) >= long_run or len(runs) == 1:
                yield Piece(shard, run)
