"""Which of a store's rows a scan looks at."""

import dataclasses
import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import numpy as np
import torch

from trackstar.progress import track
from trackstar.storage.shard import Shard
from trackstar.storage.store import Store


class StoredExample:
    """An example of a store as a predicate sees it: what is not asked for is not read.

    Attributes:
        index: its row.
    """

    def __init__(self, shard: Shard, index: int) -> None:
        self._shard = shard
        self.index = index

    @property
    def id(self) -> str:
        """Its own id, or its position in the corpus."""
        return self._shard.id(self.index)

    @property
    def text(self) -> str:
        """The text it was built from."""
        return self._shard.text(self.index)

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata it came with; empty where there was none."""
        return self._shard.metadata(self.index)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Rows of a store as ascending runs start ≤ row < stop, of which no two overlap or touch.

    However large the store, a range of its rows is one run, and a few rows or a few gaps are few runs.

    Attributes:
        starts: (runs,) int64.
        stops: (runs,) int64.
    """

    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of_range(cls, start: int, stop: int) -> Self:
        """The rows start ≤ row < stop."""
        return cls.of_rows(np.zeros(0, np.int64)) if start >= stop else cls(_array(start), _array(stop))

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> Self:
        """These rows, in any order, repeated or not."""
        rows = np.sort(rows).astype(np.int64)
        gaps = np.flatnonzero(np.diff(rows) > 1)
        return cls(rows[np.r_[0, gaps + 1][: len(rows)]], rows[np.r_[gaps, len(rows) - 1][: len(rows)]] + 1)

    @classmethod
    def of_mask(cls, mask: np.ndarray) -> Self:
        """The rows where ``mask`` holds."""
        edges = np.flatnonzero(np.diff(np.r_[False, mask, False].astype(np.int8)))
        return cls(edges[::2], edges[1::2])

    def __len__(self) -> int:
        """Rows."""
        return int((self.stops - self.starts).sum())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the runs."""
        return zip(self.starts.tolist(), self.stops.tolist(), strict=True)

    @property
    def rows(self) -> torch.Tensor:
        """The rows (n,) int64, ascending."""
        return torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(*run) for run in self)])

    def within(self, start: int, stop: int) -> Self:
        """Those of the rows that lie in start ≤ row < stop."""
        first = np.searchsorted(self.stops, start, side="right")
        last = np.searchsorted(self.starts, stop, side="left")
        starts, stops = self.starts[first:last], self.stops[first:last]
        return type(self)(starts.clip(min=start), stops.clip(max=stop))

    def __and__(self, other: Self) -> Self:
        """The rows of both."""
        first = np.searchsorted(other.stops, self.starts, side="right")
        last = np.searchsorted(other.starts, self.stops, side="left")
        counts = last - first
        mine = np.repeat(np.arange(len(counts)), counts)
        others = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts - first, counts)
        return type(self)(
            np.maximum(self.starts[mine], other.starts[others]),
            np.minimum(self.stops[mine], other.stops[others]),
        )

    def without(self, other: Self) -> Self:
        """The rows that are not the other's."""
        if not len(self.starts) or not len(other.starts):
            return self
        low, high = min(self.starts[0], other.starts[0]), max(self.stops[-1], other.stops[-1])
        starts, stops = np.r_[low, other.stops], np.r_[other.starts, high]
        kept = starts < stops
        return self & type(self)(starts[kept], stops[kept])


def matching(field: str, pattern: str) -> Callable[[StoredExample], bool]:
    """A predicate that keeps examples by a shell pattern.

    Args:
        field: "id", or a field of the metadata; examples without it are not kept.
        pattern: such as "wiki/*"; what is no string is compared as JSON writes it.
    """
    fits = re.compile(fnmatch.translate(pattern)).match

    def keep(example: StoredExample) -> bool:
        value = example.id if field == "id" else example.metadata.get(field)
        if value is None:
            return False
        return fits(value if isinstance(value, str) else json.dumps(value)) is not None

    return keep


Where = (
    range
    | Iterable[int]
    | Iterable[str]
    | Callable[[StoredExample], bool]
    | Selection
    | torch.Tensor
    | np.ndarray
    | None
)
"""A filter: a range of rows; their indices; a mask (end,) bool of all rows; ids; a predicate; None for every row."""


def select(store: Store, *filters: Where) -> Selection:
    """The rows of a store that all filters keep and that are not deleted.

    Args:
        store: the store.
        filters: each a range of rows, their indices (in any order), a boolean mask over all rows, ids (every row of
            an id that several share), or a predicate on :class:`StoredExample`; None keeps every row. Ranges,
            indices and masks cost nothing. Ids are looked for by reading the ids of all rows, and a predicate is
            called for every row that the other filters keep.

    Raises:
        TypeError: a filter is nothing of that kind.
        ValueError: a filter names a row or an id that the store does not hold, or no row is left.
        StoreError: a shard is damaged.
    """
    if len(store) == 0:
        raise ValueError(f"the store at {store.path} has no rows left")
    chosen = Selection.of_range(0, store.end).without(Selection.of_rows(store.deleted.numpy()))
    for where in filters:
        if where is not None and not callable(where):
            chosen = chosen & _rows_of(store, where)
    for where in filters:
        if callable(where):
            chosen = _find(store, chosen, where)
    if len(chosen) == 0:
        raise ValueError(f"where must keep at least one of the {len(store)} rows of the store, it keeps none")
    return chosen


def select_at_least(store: Store, where: Where, k: int) -> Selection:
    """The rows that a filter keeps, at least the k that are asked for.

    Raises:
        TypeError: ``where`` is no filter.
        ValueError: it names a row or an id that the store does not hold, or leaves fewer than k rows.
        StoreError: the store is incomplete, or a shard is damaged.
    """
    store.require_complete()
    chosen = select(store, where)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(chosen):
        limit = "the store's examples" if len(chosen) == len(store) else "the examples that where leaves"
        raise ValueError(f"k must be an int from 1 to {len(chosen)} ({limit}), got {k!r}")
    return chosen


def _rows_of(store: Store, where: Any) -> Selection:
    """The rows that a filter other than a predicate names."""
    if isinstance(where, Selection):
        return where
    if isinstance(where, range) and where.step == 1:
        if len(where) and not 0 <= where.start < where.stop <= store.end:
            raise ValueError(f"where must be a range within 0 to {store.end} (the store's rows), got {where}")
        return Selection.of_range(where.start, where.stop)
    if isinstance(where, str | bytes) or not isinstance(where, Iterable):
        raise TypeError(
            f"where must be a range, indices, a mask, ids or a function of an example, got {where!r}"
        )
    if isinstance(where, torch.Tensor):
        where = where.numpy(force=True)
    given = where if isinstance(where, np.ndarray) else list(where)
    if len(given) and all(isinstance(entry, str) for entry in given):
        return Selection.of_rows(np.array(store.indices_of(given), np.int64))
    rows = np.asarray(given, dtype=None if len(given) else np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iub":
        raise TypeError(
            f"where must hold row indices, booleans or ids, got {rows.dtype} of shape {rows.shape}"
        )
    if rows.dtype == bool:
        if len(rows) != store.end:
            raise ValueError(
                f"where must be a mask of the store's {store.end} rows, got {len(rows)} booleans"
            )
        return Selection.of_mask(rows)
    wrong = rows[(rows < 0) | (rows >= store.end)]
    if len(wrong):
        raise ValueError(f"where must hold row indices from 0 to {store.end - 1}, got {wrong[0]}")
    return Selection.of_rows(rows)


def _find(store: Store, among: Selection, keep: Callable[[StoredExample], bool]) -> Selection:
    """Those rows of ``among`` whose example ``keep`` keeps."""
    kept: list[int] = []
    with track("filtering", len(among), passing=True) as advance:
        for shard in shards_of(store, among):
            for start, stop in among.within(shard.start, shard.stop):
                kept += [row for row in range(start, stop) if keep(StoredExample(shard, row))]
                advance(stop - start)
    return Selection.of_rows(np.array(kept, np.int64))


def shards_of(store: Store, chosen: Selection) -> Iterator[Shard]:
    """The shards that hold chosen rows, in order; the others are not opened."""
    end = 0
    for start, stop in chosen:
        row = max(start, end)
        while row < stop:
            shard = store.shards[store.shards.find(row)]
            yield shard
            row = end = shard.stop


def _array(value: int) -> np.ndarray:
    return np.array([value], np.int64)
