"""One pass over a store for any number of queries, in bounded memory.

Queries that do not fit together are taken in batches, each of which scans the store again; the Hessian of all of
them shapes the scores of each batch all the same.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch

from trackstar.pieces import read_pieces
from trackstar.progress import track
from trackstar.selection import Selection
from trackstar.store import Store
from trackstar_kernels.scoring import merge_topk, prepare_task

MEMORY = 256_000_000
"""Bytes that a scan takes at most, where nothing else is said."""

SLACK = 8 << 20
"""Bytes for all the small things."""

LEAST_ROWS = 64
"""Rows that a piece can always hold: with fewer, a scan would mostly wait."""

Found = tuple[torch.Tensor, torch.Tensor]
"""Scores (Q, k) float32 and indices (Q, k) int64, best first."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """A pass over some rows of a store; :func:`plan_scan` makes one.

    Attributes:
        store: the store.
        chosen: the rows to look at.
        k: rows to find for each query.
        directions: True for the highest scores, False for the lowest; all are found in the same pass.
        batches: which queries are scored together; each batch is one pass.
        piece_rows: most rows that are scored at a time.
        bytes: what the scan takes at most beyond the queries.
    """

    store: Store
    chosen: Selection
    k: int
    directions: Sequence[bool]
    batches: Sequence[range]
    piece_rows: int
    bytes: int

    def run(self, queries: torch.Tensor, mixing: float) -> list[Found]:
        """The k best of the chosen rows for each query, in each direction.

        A pure function of the queries and the chosen rows: what scans of the single shards find, put together
        with ``merge_topk``, is what a scan of the whole store finds.

        Args:
            queries: (Q, L, d) float32, whitened, as many as were planned for.
            mixing: λ.

        Raises:
            StoreError: a shard is damaged.
        """
        with track("scanning", len(self.chosen) * len(self.batches), passing=True) as advance:
            found = [self._pass(queries, mixing, batch, advance) for batch in self.batches]
        return [
            (torch.cat([scores for scores, _ in parts]), torch.cat([indices for _, indices in parts]))
            for parts in zip(*found, strict=True)
        ]

    def _pass(
        self, queries: torch.Tensor, mixing: float, batch: range, advance: Callable[[int], None]
    ) -> list[Found]:
        """What is found for one batch."""
        task = prepare_task(queries, mixing, asked=batch)
        best = [_Best(self.k, largest) for largest in self.directions]
        with contextlib.closing(read_pieces(self.store, self.chosen, self.piece_rows)) as pieces:
            for piece in pieces:
                k = min(self.k, len(piece))
                arrays = piece.codes, piece.squared_norms, k
                if len(best) == 1:
                    found = [task.topk(*arrays, scales=piece.scales, largest=best[0].largest)]
                else:
                    highest, lowest = task.extremes(*arrays, scales=piece.scales)
                    found = [highest if one.largest else lowest for one in best]
                for one, (scores, positions) in zip(best, found, strict=True):
                    one.add(scores, piece.rows[positions])
                advance(len(piece))
        return [one.merged() for one in best]


def plan_scan(
    store: Store,
    chosen: Selection,
    queries: int,
    k: int,
    *,
    mixed: bool = True,
    directions: Sequence[bool] = (True,),
    memory: int = MEMORY,
) -> Scan:
    """A scan with the largest batches of queries and, with what is left, the largest pieces that ``memory`` allows.

    Args:
        store: the store.
        chosen: the rows to look at.
        queries: Q.
        k: rows per query, 1 ≤ k ≤ len(chosen).
        mixed: whether λ > 0.
        directions: see :class:`Scan`.
        memory: bytes.

    Raises:
        ValueError: a single query and a few rows need more.
    """
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise ValueError(f"memory must be a number of bytes, got {memory!r}")
    L, d, threads = *store.row_shape, torch.get_num_threads()
    # What csrc/scoring.h works with: tiles of 48 rows, and for each thread and query a reservoir of 2k + 64
    # candidates of 16 bytes. Merging takes 3k candidates of 12 bytes and sorts them three times.
    reservoir = 16 * (2 * k + 64)
    per_query = 192 * threads + len(directions) * (threads * reservoir + 220 * k)
    fixed = SLACK + 192 * 64 * threads + threads * threads * reservoir + 12 * k * queries * len(directions)
    if mixed:
        rank = d if 7 * d < 8 * queries else queries
        fixed += 4 * L * (rank + 32) * d + 192 * rank * threads + 8 * (6 * rank**2 + 2 * queries * d)
        per_query += 4 * (L + 3) * (rank + 16)  # vectors are padded to whole panels
        per_row = 24 * (queries + d)
    else:
        per_query += 20 * L * d
        per_row = 4 * L
    # The piece that is scored and the one that is read; rows that are copied lie beside what they are copied from.
    copies = 2 if len(chosen.starts) == 1 else 3
    per_row += 32 + copies * store.layout.row_bytes
    least = fixed + per_query + LEAST_ROWS * per_row
    if memory < least:
        raise ValueError(
            f"memory must be at least {least:,} bytes for {queries} queries and k = {k} on this store, got {memory:,}"
        )
    for_rows = max(memory // 4, LEAST_ROWS * per_row)
    together = max((memory - for_rows - fixed) // per_query, 1)
    count = -(-queries // together)
    batches = [range(queries * i // count, queries * (i + 1) // count) for i in range(count)]
    taken = fixed + max(len(batch) for batch in batches) * per_query
    rows = (memory - taken) // per_row
    return Scan(store, chosen, k, directions, batches, rows, taken + rows * per_row)


class _Best:
    """The k best of what is found piece by piece; merged when k more have come together, not at every piece."""

    def __init__(self, k: int, largest: bool) -> None:
        self.k, self.largest = k, largest
        self._parts: list[Found] = []

    def add(self, scores: torch.Tensor, indices: torch.Tensor) -> None:
        self._parts.append((scores, indices))
        if sum(part.shape[1] for part, _ in self._parts) >= 2 * self.k:
            self._parts = [self.merged()]

    def merged(self) -> Found:
        return merge_topk(self._parts, self.k, self.largest)
