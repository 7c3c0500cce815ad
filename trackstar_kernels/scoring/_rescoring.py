"""Exact answers from a wider copy of narrow rows, of which most are never looked at."""

from collections.abc import Callable, Sequence

import torch

from trackstar_kernels.scoring._bounds import TaskBounds, distances
from trackstar_kernels.scoring._hessian import SCRATCH, Found, WiderRows
from trackstar_kernels.scoring._merge import merge_topk

BOUNDS = 4 * 2**20
"""Bytes of working memory for bounds."""

Parts = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Numerators (n, Q), squares (n,) and inner products (n,) of codes and their scales, see ``TaskBounds.above``."""

Scan = Callable[..., list[Found]]
"""See ``PreparedTask.scan``."""


def rescored_topk(
    bounds: TaskBounds,
    parts: Parts,
    scan: Scan,
    codes: torch.Tensor,
    wider: WiderRows,
    squared_norms: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    ends: tuple[bool, ...],
    reached: Sequence[torch.Tensor | None],
) -> tuple[list[Found], int]:
    """The best of the wider rows under a task at each of ``ends``, and how many of them were scored.

    A piece of the codes at a time, the rows that may be among the best of a query are scored by ``scan``: first those
    that promise most, which raises the scores to be reached, then what is left. Every row is scored for all queries.
    """
    count = len(bounds.reach)
    found: list[Found] = [(torch.empty(count, 0), torch.empty(count, 0, dtype=torch.int64)) for _ in ends]
    rescored = 0
    row_bytes = max(1, wider.rows[0].numel() * wider.rows.element_size())
    for piece in torch.arange(len(codes)).split(max(1, BOUNDS // (32 * (1 + len(ends)) * count))):
        here = slice(int(piece[0]), int(piece[-1]) + 1)
        numerators, squares, inner = parts(codes[here], None if scales is None else scales[here])
        whole = squared_norms[here].double().sum(1)
        apart = distances(whole, squares, wider.rows.dtype, wider.rows[0].numel())
        above = [bounds.above(_sign(end) * numerators, squares, inner, whole, apart) for end in ends]
        waiting = torch.ones(len(piece), dtype=torch.bool)
        for promising in (True, False):
            wanted = torch.zeros(len(piece), dtype=torch.bool)
            for bound, end, best, least in zip(above, ends, found, reached, strict=True):
                chosen = _may_enter(bound, best, least, k, _sign(end))
                wanted |= (chosen & _most_promising(bound, k) if promising else chosen).any(1)
            rows = (wanted & waiting).nonzero()[:, 0]
            waiting[rows] = False
            rescored += len(rows)
            for positions in (rows + here.start).split(max(1, SCRATCH // row_bytes)) if len(rows) else ():
                arrays = wider.at(positions), squared_norms[positions], min(k, len(positions))
                for i, (scores, places) in enumerate(scan(*arrays, None, ends, 0)):
                    found[i] = merge_topk([found[i], (scores, positions[places])], k, ends[i])
    return found, rescored


def _sign(largest: bool) -> int:
    return 1 if largest else -1


def _most_promising(above: torch.Tensor, k: int) -> torch.Tensor:
    """(n, Q): whether a row's bound is among the k highest of a query."""
    highest = above.nan_to_num(nan=torch.inf).topk(min(k, len(above)), dim=0).indices
    return torch.zeros(above.shape, dtype=torch.bool).scatter_(0, highest, True)


def _may_enter(
    above: torch.Tensor, found: Found, reached: torch.Tensor | None, k: int, sign: int
) -> torch.Tensor:
    """(n, Q): whether a row's bound does not rule it out. Bounds and scores that are NaN rule nothing out."""
    possible = torch.ones(above.shape, dtype=torch.bool)
    for least in (reached, found[0][:, -1] if found[0].shape[1] == k else None):
        if least is not None:
            possible &= ~(above < sign * least.double())
    return possible
