"""One pass over a store for any number of queries, in bounded memory.

Queries that do not fit together are taken in batches, each of which scans the store again; the Hessian of all of
them shapes the scores of each batch all the same.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import torch

from trackstar.layout import Layout
from trackstar.pieces import Piece, read_pieces
from trackstar.products import Products, Weigh
from trackstar.progress import track
from trackstar.selection import Selection
from trackstar.store import Store
from trackstar_kernels.scoring import Task, merge_topk, prepare_task, staged

MEMORY = 256_000_000
"""Bytes that a scan takes at most, where nothing else is said."""

SLACK = 8 << 20
"""Bytes for all the small things."""

LEAST_ROWS = 64
"""Rows that a piece can always hold: with fewer, a scan would mostly wait."""

CPU = torch.device("cpu")

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
        bytes: what the scan takes at most beyond the queries, of the CPU's memory.
        device: where pieces are scored.
    """

    store: Store
    chosen: Selection
    k: int
    directions: Sequence[bool]
    batches: Sequence[range]
    piece_rows: int
    bytes: int
    device: torch.device

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
        queries = queries.to(self.device)
        return self._run(lambda batch: prepare_task(queries, mixing, asked=batch))

    def products(self, queries: torch.Tensor, weigh: Weigh | None = None) -> list[Found]:
        """The chosen rows with the k best w_m · Σ_b ⟨a_b, y_m,b⟩ for each query a, in each direction.

        Args:
            queries: (Q, L, d) float32, as many as were planned for.
            weigh: what gives the rows' weights w, see :mod:`trackstar.products`; None for 1.

        Raises:
            StoreError: a shard is damaged.
        """
        return self._run(lambda batch: Products(queries[batch.start : batch.stop].to(self.device)), weigh)

    def _run(self, prepare: Callable[[range], Task | Products], weigh: Weigh | None = None) -> list[Found]:
        """What is found for all batches, each prepared when its turn comes."""
        with track("scanning", len(self.chosen) * len(self.batches), passing=True) as advance:
            found = [self._pass(prepare(batch), weigh, advance) for batch in self.batches]
        return [
            (torch.cat([scores for scores, _ in parts]), torch.cat([indices for _, indices in parts]))
            for parts in zip(*found, strict=True)
        ]

    def _pass(
        self, task: Task | Products, weigh: Weigh | None, advance: Callable[[int], None]
    ) -> list[Found]:
        """What is found for one batch."""
        best = [_Best(self.k, largest) for largest in self.directions]
        with contextlib.closing(read_pieces(self.store, self.chosen, self.piece_rows)) as pieces:
            for rows, codes, scales, squared_norms in _on_device(pieces, self.device):
                if weigh is not None:
                    scales = weigh(rows, codes, scales)
                arrays = codes, squared_norms, min(self.k, len(rows))
                if len(best) == 1:
                    found = [task.topk(*arrays, scales=scales, largest=best[0].largest)]
                else:
                    highest, lowest = task.extremes(*arrays, scales=scales)
                    found = [highest if one.largest else lowest for one in best]
                for one, (scores, positions) in zip(best, found, strict=True):
                    one.add(scores.cpu(), rows[positions.cpu()])
                advance(len(rows))
        return [one.merged() for one in best]


def _on_device(
    pieces: Iterable[Piece], device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Each piece's rows, and codes, scales and squared norms on ``device``."""
    if device.type == "cpu":
        for piece in pieces:
            yield piece.rows, piece.codes, piece.scales, piece.squared_norms
        return
    rows: collections.deque[torch.Tensor] = collections.deque()

    def tensors() -> Generator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        for piece in pieces:
            rows.append(piece.rows)
            yield piece.codes, piece.scales, piece.squared_norms

    for codes, scales, squared_norms in staged(tensors(), device):
        yield rows.popleft(), codes, scales, squared_norms


def plan_scan(
    store: Store,
    chosen: Selection,
    queries: int,
    k: int,
    *,
    mixed: bool = True,
    unwhitened_norms: bool = False,
    directions: Sequence[bool] = (True,),
    memory: int = MEMORY,
    device: torch.device = CPU,
) -> Scan:
    """A scan with the largest batches of queries and, with what is left, the largest pieces that ``memory`` allows.

    Args:
        store: the store.
        chosen: the rows to look at.
        queries: Q.
        k: rows per query, 1 ≤ k ≤ len(chosen).
        mixed: whether λ > 0.
        unwhitened_norms: whether rows are weighed by the norms they had before they were whitened.
        directions: see :class:`Scan`.
        memory: bytes.
        device: where pieces are scored: the CPU, or a CUDA device that they are copied to, through pinned memory.

    Raises:
        ValueError: a single query and a few rows need more.
    """
    # The piece that is scored and the one that is read; rows that are copied lie beside what they are copied from;
    # and on their way to another device pieces pass through two buffers.
    copies = (2 if len(chosen.starts) == 1 else 3) + (0 if device.type == "cpu" else 2)
    found = fit_scan(
        store.layout,
        queries,
        k,
        mixed=mixed,
        unwhitened_norms=unwhitened_norms,
        directions=len(directions),
        copies=copies,
        memory=memory,
    )
    return Scan(store, chosen, k, directions, *found, device)


def fit_scan(
    layout: Layout,
    queries: int,
    k: int,
    *,
    mixed: bool,
    directions: int,
    copies: int,
    memory: int,
    unwhitened_norms: bool = False,
) -> tuple[list[range], int, int]:
    """Batches, rows of a piece, and bytes of a scan: see :class:`Scan` and :func:`plan_scan`.

    Args:
        layout: of the store.
        queries: Q.
        k: rows per query.
        mixed: whether λ > 0.
        directions: 2 where highest and lowest scores are found.
        copies: of a piece's rows that are in memory at a time.
        memory: bytes.
        unwhitened_norms: whether the rows' norms before whitening are needed.
    """
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise ValueError(f"memory must be a number of bytes, got {memory!r}")
    L, d, threads = layout.blocks, layout.size, torch.get_num_threads()
    # What csrc/scoring.h works with: tiles of 48 rows, and for each thread and query a reservoir of 2k + 64
    # candidates of 16 bytes, or, of codes, k and 2k + 512 that wait. Merging takes 3k candidates of 12 bytes and
    # sorts them three times.
    reservoir = 16 * (3 * k + 512 if layout.narrow else 2 * k + 64)
    per_query = 192 * threads + directions * (threads * reservoir + 220 * k)
    fixed = SLACK + 192 * 64 * threads + threads * threads * reservoir + 12 * k * queries * directions
    if mixed:
        rank = d if 7 * d < 8 * queries else queries
        fixed += 4 * L * (rank + 32) * d + 192 * rank * threads + 8 * (6 * rank**2 + 2 * queries * d)
        per_query += 4 * (L + 3) * (rank + 16)  # vectors are padded to whole panels
        per_row = 24 * (queries + d)
    else:
        per_query += 20 * L * d
        per_row = 4 * L
    if unwhitened_norms:
        fixed += 4 * L * d**2
        per_row += 12 * d
    per_row += 32 + copies * layout.row_bytes
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
    return batches, rows, taken + rows * per_row


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
