"""One pass over a store for any number of queries, in bounded memory.

Queries that do not fit together are taken in batches, each of which scans the store again; the Hessian of all of
them shapes the scores of each batch all the same.

Where narrow rows have a wider copy the answer is the wider rows'. Codes rule out what they can and the rest is scored
from the copy; where they rule out too little, as codes of many thousands of numbers must, the copy alone is read.
"""

import collections
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from trackstar.progress import track
from trackstar.scoring.pieces import Piece, read_pieces
from trackstar.scoring.products import Weigh
from trackstar.scoring.selection import Selection
from trackstar.storage.layout import Layout
from trackstar.storage.store import Store
from trackstar_kernels.scoring import Task, merge_topk, prepare_task, score_topk, staged

MEMORY = 256_000_000
"""Bytes that a scan takes at most, where nothing else is said."""

SLACK = 8 << 20
"""Bytes for all the small things."""

BOUNDS = 4 << 20
"""Bytes for the bounds of narrow rows."""

LEAST_ROWS = 64
"""Rows that a piece can always hold: with fewer, a scan would mostly wait."""

CPU = torch.device("cpu")


class Found(NamedTuple):
    """What a scan finds in one direction.

    Attributes:
        scores: (Q, k) float32, best first.
        indices: (Q, k) int64.
        rescored: (Q,) int64, of narrow rows that have a wider copy: how many were scored from it.
        bounds: (Q, k) float32, of narrow rows without: how far each score may be from that of the row before it was
            narrowed.
    """

    scores: torch.Tensor
    indices: torch.Tensor
    rescored: torch.Tensor | None = None
    bounds: torch.Tensor | None = None

    @classmethod
    def of_batches(cls, parts: "Sequence[Found]") -> "Found":
        """What is found for all queries, from what is found for some at a time."""
        scores, indices, *others = zip(*parts, strict=True)
        rescored, bounds = (None if tensors[0] is None else torch.cat(tensors) for tensors in others)
        return cls(torch.cat(scores), torch.cat(indices), rescored, bounds)


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
        rescore: whether the answer is that of the wider copy of narrow rows.
    """

    store: Store
    chosen: Selection
    k: int
    directions: Sequence[bool]
    batches: Sequence[range]
    piece_rows: int
    bytes: int
    device: torch.device
    rescore: bool

    def run(self, queries: torch.Tensor, mixing: float, task: range | None = None) -> list[Found]:
        """The k best of the chosen rows for each query, in each direction.

        A pure function of the queries and the chosen rows: what scans of the single shards find, put together
        with ``merge_topk``, is what a scan of the whole store finds.

        Args:
            queries: (Q, L, d) float32, whitened, as many as were planned for, and those of another task behind them.
            mixing: λ.
            task: positions of the other task's queries, which make R_eval; None where all are asked and make it.

        Raises:
            StoreError: a shard is damaged.
        """
        with track("scanning", len(self.chosen) * len(self.batches), passing=True) as advance:
            passes = [self._pass(queries, mixing, batch, task, advance) for batch in self.batches]
        return [Found.of_batches(parts) for parts in zip(*passes, strict=True)]

    def products(self, queries: torch.Tensor, weigh: Weigh | None = None) -> list[Found]:
        """The chosen rows with the k best w_m · Σ_b ⟨a_b, y_m,b⟩ for each query a, in each direction.

        Where there is a wider copy of narrow rows, and it is to be used, it alone is read. Without, the products are
        those of the rows that the codes stand for, and no bounds are known.

        Args:
            queries: (Q, L, d) float32, as many as were planned for.
            weigh: what gives the rows' weights w, see :mod:`trackstar.scoring.products`; None for 1.

        Raises:
            StoreError: a shard is damaged.
        """
        with track("scanning", len(self.chosen) * len(self.batches), passing=True) as advance:
            passes = [
                self._products_pass(queries[batch.start : batch.stop], weigh, advance)
                for batch in self.batches
            ]
        return [Found.of_batches(parts) for parts in zip(*passes, strict=True)]

    def _products_pass(
        self, queries: torch.Tensor, weigh: Weigh | None, advance: Callable[[int], None]
    ) -> list[Found]:
        """What is found for one batch."""
        queries = queries.to(self.device)
        best = [_Best(self.k, largest) for largest in self.directions]
        with read_pieces(self.store, self.chosen, self.piece_rows, lambda: self.rescore) as pieces:
            for piece, codes, scales, _ in _on_device(pieces, self.device):
                weights = scales if weigh is None else weigh(piece.rows, codes, scales)
                for one in best:
                    scores, positions = score_topk(
                        queries, codes, min(self.k, len(piece)), scales=weights, largest=one.largest
                    )
                    one.add(scores.cpu(), piece.rows[positions.cpu()])
                advance(len(piece))
        rescored = torch.full((len(queries),), len(self.chosen)) if self.rescore else None
        return [Found(*one.merged(), rescored=rescored) for one in best]

    def _pass(
        self,
        queries: torch.Tensor,
        mixing: float,
        batch: range,
        task: range | None,
        advance: Callable[[int], None],
    ) -> list[Found]:
        """What is found for one batch."""
        best = [_Best(self.k, largest) for largest in self.directions]
        choice = _Choice(possible=self.rescore, codes=self.device.type == "cpu")
        rescored = 0
        with read_pieces(self.store, self.chosen, self.piece_rows, choice.wide) as pieces:
            prepared = prepare_task(queries.to(self.device), mixing, asked=batch, task=task)
            for piece, codes, scales, squared_norms in _on_device(pieces, self.device):
                if self.rescore and not piece.wide:
                    found, count = self._rescored(prepared, piece, best)
                    choice.learn(len(piece), count)
                else:
                    found = self._scored(prepared, codes, scales, squared_norms, best)
                    count = len(piece) if piece.wide else 0
                    choice.seen += len(piece)
                for one, (scores, positions) in zip(best, found, strict=True):
                    one.add(scores.cpu(), piece.rows[positions.cpu()])
                rescored += count
                advance(len(piece))
        found = [one.merged() for one in best]
        if self.rescore:
            return [Found(*one, rescored=torch.full((len(batch),), rescored)) for one in found]
        if self.store.layout.narrow:
            if self.device.type != "cpu":
                prepared = prepare_task(queries, mixing, asked=batch, task=task)
            return [Found(*one, bounds=self._bounds(prepared, one[1])) for one in found]
        return [Found(*one) for one in found]

    def _scored(
        self,
        task: Task,
        codes: torch.Tensor,
        scales: torch.Tensor | None,
        squared_norms: torch.Tensor,
        best: "Sequence[_Best]",
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The best of a piece in each direction, as far as they are among the best so far."""
        arrays = codes, squared_norms, min(self.k, len(codes))
        reached = {one.largest: one.reached for one in best}
        if len(self.directions) == 1:
            (largest,) = self.directions
            return [task.topk(*arrays, scales=scales, largest=largest, reached=reached[largest])]
        highest, lowest = task.extremes(*arrays, scales=scales, reached=(reached[True], reached[False]))
        return [highest if largest else lowest for largest in self.directions]

    def _rescored(
        self, task: Task, piece: Piece, best: "Sequence[_Best]"
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int]:
        """The best of a piece in each direction by its wider rows, and how many of these were scored."""
        wider, places = piece.look_up()
        return task.rescored(
            piece.codes,
            wider,
            piece.squared_norms,
            min(self.k, len(piece)),
            scales=_scales(piece),
            ends=tuple(self.directions),
            places=places,
            reached=[one.reached for one in best],
        )

    def _bounds(self, task: Task, indices: torch.Tensor) -> torch.Tensor:
        """How far the scores of the rows found may be off: (Q, k), as their indices."""
        bounds = torch.zeros(indices.shape)
        rows = Selection.of_rows(indices.unique().numpy())
        size = max(1, min(self.piece_rows, BOUNDS // (64 * len(indices))))
        with read_pieces(self.store, rows, size, lambda: False) as pieces:
            for piece in pieces:
                found = task.score_bounds(piece.codes, piece.squared_norms, scales=_scales(piece))
                places = torch.searchsorted(piece.rows, indices).clamp_max(len(piece) - 1)
                bounds = torch.where(piece.rows[places] == indices, found.gather(1, places), bounds)
        return bounds


class _Choice:
    """Whether to read the codes of rows or their wider copy, by what the codes were good for so far.

    Where more than half of a piece's rows have to be scored from the copy as well, codes are left alone until as many
    rows again have gone by: scores that are known by then may rule out more.
    """

    def __init__(self, *, possible: bool, codes: bool) -> None:
        self.possible, self.codes = possible, codes
        self.seen = self.patience = 0

    def wide(self) -> bool:
        """Whether to read the copy."""
        return self.possible and (not self.codes or self.seen < self.patience)

    def learn(self, rows: int, rescored: int) -> None:
        """Of a piece, how many rows were scored from the copy as well."""
        self.seen += rows
        self.patience = 2 * self.seen if 2 * rescored > rows else 0


def _scales(piece: Piece) -> torch.Tensor:
    """Those of a piece of narrow rows."""
    if piece.scales is None:
        raise ValueError("only narrow rows have scales")
    return piece.scales


def _on_device(
    pieces: Iterable[Piece], device: torch.device
) -> Iterator[tuple[Piece, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Each piece, and its codes, scales and squared norms on ``device``."""
    if device.type == "cpu":
        for piece in pieces:
            yield piece, piece.codes, piece.scales, piece.squared_norms
        return
    coming: collections.deque[Piece] = collections.deque()

    def tensors() -> Generator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        for piece in pieces:
            coming.append(piece)
            yield piece.codes, piece.scales, piece.squared_norms

    for codes, scales, squared_norms in staged(tensors(), device):
        yield coming.popleft(), codes, scales, squared_norms


def plan_scan(
    store: Store,
    chosen: Selection,
    queries: int,
    k: int,
    *,
    task: int = 0,
    mixed: bool = True,
    unwhitened_norms: bool = False,
    directions: Sequence[bool] = (True,),
    memory: int = MEMORY,
    device: torch.device = CPU,
    rescore: bool = True,
) -> Scan:
    """A scan with the largest batches of queries and, with what is left, the largest pieces that ``memory`` allows.

    Args:
        store: the store.
        chosen: the rows to look at.
        queries: Q.
        k: rows per query, 1 ≤ k ≤ len(chosen).
        task: queries of another task that make R_eval, if it is not those that are asked.
        mixed: whether λ > 0.
        unwhitened_norms: whether rows are weighed by the norms they had before they were whitened.
        directions: see :class:`Scan`.
        memory: bytes.
        device: where pieces are scored: the CPU, or a CUDA device that they are copied to, through pinned memory.
        rescore: answer from the wider copy of narrow rows, where there is one.

    Raises:
        ValueError: a single query and a few rows need more.
    """
    # The piece that is scored and the one that is read; rows that are copied lie beside what they are copied from;
    # and on their way to another device pieces pass through two buffers.
    copies = (2 if len(chosen.starts) == 1 else 3) + (0 if device.type == "cpu" else 2)
    layout = store.layout if rescore else dataclasses.replace(store.layout, wide=None)
    found = fit_scan(
        layout,
        queries,
        k,
        task=task,
        mixed=mixed,
        unwhitened_norms=unwhitened_norms,
        directions=len(directions),
        copies=copies,
        memory=memory,
    )
    return Scan(store, chosen, k, directions, *found, device, layout.wide is not None)


def fit_scan(
    layout: Layout,
    queries: int,
    k: int,
    *,
    mixed: bool,
    directions: int,
    copies: int,
    memory: int,
    task: int = 0,
    unwhitened_norms: bool = False,
) -> tuple[list[range], int, int]:
    """Batches, rows of a piece, and bytes of a scan: see :class:`Scan` and :func:`plan_scan`.

    Args:
        layout: of the store; without ``wide`` where a wider copy is not to be used.
        queries: Q.
        k: rows per query.
        mixed: whether λ > 0.
        directions: 2 where highest and lowest scores are found.
        copies: of a piece's rows that are in memory at a time.
        memory: bytes.
        task: queries of another task.
        unwhitened_norms: whether the rows' norms before whitening are needed.
    """
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise ValueError(f"memory must be a number of bytes, got {memory!r}")
    L, d, threads = layout.blocks, layout.size, torch.get_num_threads()
    # What csrc/scoring.h works with: a tile of rows as bytes, scores of at most 64 rows from bytes and of fewer than 96
    # from floats, and for each thread and query a reservoir of at most 2k + 64 candidates of 16 bytes, or, where bounds
    # rule rows out, k and 2k + 128 that wait. Merging takes copies of some 3k.
    reservoir = 16 * (3 * k + 128 if layout.narrow else 2 * k + 64)
    per_query = 640 * threads + directions * (threads * reservoir + 220 * k)
    fixed = SLACK + 640 * 64 * threads + threads * threads * reservoir + 12 * k * queries * directions
    per_row = 0
    known = queries + task
    # Bounds of narrow rows are those of a task, whatever λ.
    if mixed or layout.narrow:
        rank = d if 7 * d < 8 * known else known
        fixed += 4 * L * (rank + 32) * d + 192 * rank * threads + 8 * (6 * rank**2 + 2 * known * d)
        per_query += 4 * (L + 3) * (rank + 16)  # vectors are padded to whole panels
        per_row += 24 * (known + d)
    if not mixed:
        per_query += 21 * L * d
        per_row += 4 * L
    if layout.narrow or not mixed:
        fixed += max(2**18, 32 * L * d) * threads
    if layout.narrow:
        fixed += BOUNDS
    if layout.dtype == "sign":
        per_query += 4 * L * (-d % 256)  # of tables, which are padded
    if unwhitened_norms:
        fixed += 4 * L * d**2
        per_row += 12 * d
    if layout.wide is not None:
        per_row += layout.row_bytes  # copies of the rows that are scored again
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
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, scores: torch.Tensor, indices: torch.Tensor) -> None:
        self._parts.append((scores, indices))
        if self._count() >= 2 * self.k:
            self.merged()

    @property
    def reached(self) -> torch.Tensor | None:
        """Scores (Q,) that k rows have; None before there are as many."""
        return self.merged()[0][:, -1].contiguous() if self._count() >= self.k else None

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self._parts) > 1:
            self._parts = [merge_topk(self._parts, self.k, self.largest)]
        return self._parts[0]

    def _count(self) -> int:
        return sum(scores.shape[1] for scores, _ in self._parts)
