"""Exact answers from a wider copy of narrow rows, of which most are never looked at."""

from collections.abc import Callable

import torch

from trackstar_kernels.scoring._bounds import TaskBounds, distances
from trackstar_kernels.scoring._hessian import SCRATCH, Found, Hessian
from trackstar_kernels.scoring._merge import merge_topk

Parts = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Numerators (n, Q), squares (n,) and inner products (n,) of codes and their scales, see ``TaskBounds.above``."""

Scan = Callable[..., list[Found]]
"""See ``_prepare`` of the package."""


def rescored_topk(
    hessian: Hessian,
    parts: Parts,
    scan: Scan,
    codes: torch.Tensor,
    wider: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    largest: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k best of the wider rows under a task, and how many of them each query had scored.

    A piece of the codes at a time, the rows that may be among the best of a query are scored by ``scan``: first those
    that promise most, which raises the scores to be reached, then what is left.
    """
    count, d = hessian.count, hessian.queries[0].numel()
    bounds, sign = TaskBounds.of(hessian), 1 if largest else -1
    found: Found = torch.empty(count, 0), torch.empty(count, 0, dtype=torch.int64)
    rescored = torch.zeros(count, dtype=torch.int64)
    for piece in torch.arange(len(codes)).split(max(1, SCRATCH // (64 * count))):
        here = slice(int(piece[0]), int(piece[-1]) + 1)
        numerators, squares, inner = parts(codes[here], None if scales is None else scales[here])
        whole = squared_norms[here].double().sum(1)
        apart = distances(whole, squares, wider.dtype, d)
        above = bounds.above(sign * numerators, squares, inner, whole, apart)
        promising = torch.zeros(above.shape, dtype=torch.bool)
        first = above.nan_to_num(nan=torch.inf).topk(min(k, len(piece)), dim=0).indices
        promising.scatter_(0, first, True)
        waiting = torch.ones_like(promising)
        for chosen in (promising, ~promising):
            wanted = chosen & waiting & _may_enter(above, found, k, sign)
            rescored += wanted.sum(0)
            rows = wanted.any(1).nonzero()[:, 0]
            waiting[rows] = False
            row_bytes = max(1, wider[0].numel() * wider.element_size())
            for positions in (rows + here.start).split(max(1, SCRATCH // row_bytes)) if len(rows) else ():
                arrays = wider[positions], squared_norms[positions], min(k, len(positions))
                ((scores, places),) = scan(*arrays, None, (largest,), 0)
                found = merge_topk([found, (scores, positions[places])], k, largest)
    return *found, rescored


def _may_enter(above: torch.Tensor, found: Found, k: int, sign: int) -> torch.Tensor:
    """(n, Q): whether a row's bound does not rule it out."""
    if found[0].shape[1] < k:
        return torch.ones(above.shape, dtype=torch.bool)
    return ~(above < sign * found[0][:, -1].double())
