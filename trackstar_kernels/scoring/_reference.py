"""Both ops as their definitions say, on dense matrices, in the dtype of the queries."""

import torch

from trackstar_kernels._codes import NARROW, decode_rows
from trackstar_kernels.scoring._hessian import Found, PreparedTask, Reached
from trackstar_kernels.scoring._merge import best_first


def score_topk(
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`trackstar_kernels.score_topk`; queries (Q, L, d), rows (N, L, …), scales (N, L) or None."""
    rows = decode_rows(rows, scales, queries.shape[2], queries.dtype)
    return _topk(queries.flatten(1) @ rows.flatten(1).T, k, largest, start)


def mixed_topk(
    queries: torch.Tensor,
    rows: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    mixing: float,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
    task: slice | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`trackstar_kernels.mixed_topk`. Takes the norms of float rows from the rows."""
    d = queries.shape[2]
    narrow = rows.dtype in NARROW
    rows = decode_rows(rows, scales, d, queries.dtype)
    x, y = queries.transpose(0, 1), rows.transpose(0, 1)  # (L, Q, d), (L, N, d)
    members = x[:, task or slice(None)]
    moment = members.mT @ members / members.shape[1]
    hessian = mixing * moment + (1 - mixing) * torch.eye(d, dtype=x.dtype, device=x.device)
    # Not torch.linalg.solve: on several threads, torch 2.13's fails for batches of large matrices.
    cholesky = torch.linalg.cholesky(hessian)
    solved_x = torch.cholesky_solve(x.mT, cholesky).mT
    solved_y = torch.cholesky_solve(y.mT, cholesky).mT
    numerator = torch.einsum("lqd,lnd->qn", solved_x, y)
    x_norms = (solved_x * x).sum((0, 2)).sqrt()
    y_squares = (solved_y * y).sum((0, 2))
    if narrow:
        lost = (squared_norms.to(y.dtype) - rows.square().sum(2)).sum(1)
        y_squares += lost.clamp_min(0) / (1 - mixing)
    norms = x_norms[:, None] * y_squares.sqrt()
    return _topk(torch.where(norms == 0, 0, numerator / norms), k, largest, start)


class _Task(PreparedTask):
    """Nothing is prepared: every call computes everything."""

    def __init__(self, queries: torch.Tensor, mixing: float, asked: slice, task: slice | None) -> None:
        self.queries, self.mixing, self.asked, self.task = queries, mixing, asked, task

    def scan(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        ends: tuple[bool, ...],
        start: int,
        reached: Reached = (),
    ) -> list[Found]:
        arrays = self.queries, rows, squared_norms, k, self.mixing, scales
        found = [mixed_topk(*arrays, largest, start, self.task) for largest in ends]
        return [(scores[self.asked], indices[self.asked]) for scores, indices in found]


def prepare_task(queries: torch.Tensor, mixing: float, asked: slice, task: slice | None) -> PreparedTask:
    """See :func:`trackstar_kernels.scoring.prepare_task`."""
    return _Task(queries, mixing, asked, task)


def rescored_topk(
    queries: torch.Tensor,
    codes: torch.Tensor,
    wider: torch.Tensor,
    squared_norms: torch.Tensor,
    k: int,
    scales: torch.Tensor | None,
    largest: bool,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`trackstar_kernels.rescored_topk`. Scores all wider rows."""
    scores, indices = score_topk(queries, wider, k, None, largest, start)
    return scores, indices, torch.full_like(indices[:, 0], len(wider))


def _topk(scores: torch.Tensor, k: int, largest: bool, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    Q, N = scores.shape
    indices = torch.arange(start, start + N, device=scores.device).expand(Q, N)
    order = best_first(scores, indices, largest)[:, :k]
    return scores.gather(1, order), indices.gather(1, order)
