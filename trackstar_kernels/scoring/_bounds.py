"""How far scores of narrow rows may be from those of the rows that the codes were made of.

A narrow row ŷ is the projection of a row y on the direction of its codes (encode/README.md), so what is lost is known:
‖y − ŷ‖² = ‖y‖² − ‖ŷ‖². In the mixed Hessian H = I − c·xᵀ M x of a task (scoring/README.md), 0 ≼ H ≼ I,

    | x H y − x H ŷ |   ≤ ‖H x‖ · ‖y − ŷ‖
    | √(yᵀ H y) − √(ŷᵀ H ŷ) | ≤ ‖y − ŷ‖
"""

import dataclasses

import torch

from trackstar_kernels._codes import decode_rows
from trackstar_kernels.scoring._hessian import Hessian, inverse_root

PROJECTION = 2.0**-20
"""What roundings may take from ‖y − ŷ‖² = ‖y‖² − ‖ŷ‖², as a part of ‖y‖²: of scales, squared norms and their sums."""

SCORE_ERROR = 2e-5
"""What mixed_topk may be off by, twice."""


def distances(whole: torch.Tensor, squares: torch.Tensor, dtype: torch.dtype, d: int) -> torch.Tensor:
    """At most ‖w − ŷ‖ for the rows w that were kept in ``dtype`` beside the codes, or were coded if it is float32.

    Args:
        whole: squared norms ‖y‖² before narrowing, float64.
        squares: ‖ŷ‖², float64, of the same shape.
        dtype: of the wider rows.
        d: numbers of a row.
    """
    lost = (whole - squares).clamp_min(0) + PROJECTION * whole
    if dtype == torch.float16:
        rounding = 2.0**-11 * whole.sqrt() + 2.0**-25 * d**0.5
    else:
        rounding = 2.0**-23 * whole.sqrt()
    return lost.sqrt() + rounding


@dataclasses.dataclass(frozen=True)
class TaskBounds:
    """What of a task's queries the bounds need, float64.

    Attributes:
        reach: (Q,) ‖H x‖ / √(xᵀ H x).
        rounding: (Q,) what float32 may take from x H ŷ / √(xᵀ H x), for ‖ŷ‖ = 1.
        slack: what float32 may take from ŷᵀ H ŷ, for ‖ŷ‖ = 1.
    """

    reach: torch.Tensor
    rounding: torch.Tensor
    slack: float

    @classmethod
    def of(cls, hessian: Hessian) -> "TaskBounds":
        """Those of the queries that are asked."""
        _, L, d = hessian.queries.shape
        unit = 2.0**-24 * (512 + d / 128 + 2 * L + hessian.rank / 128)  # roundings one after another
        reach, largest, squares = (
            hessian.queries.new_zeros(hessian.count, dtype=torch.float64) for _ in range(3)
        )
        frobenius = 0.0
        for factor, combine, square in hessian.blocks():
            norms = factor.norm(dim=1)
            reach += (combine @ factor).square().sum(1)
            largest = torch.maximum(largest, combine.abs() @ norms)
            frobenius = max(frobenius, norms.norm().item())
            squares += square
        weights = inverse_root(squares)
        spread = unit * frobenius * abs(hessian.sign) ** 0.5
        return cls(
            reach=reach.sqrt() * weights,
            rounding=2 * unit * L**0.5 * largest * weights,
            slack=2 * spread + spread**2 + 2 * unit,
        )

    def above(
        self,
        numerators: torch.Tensor,
        squares: torch.Tensor,
        inner: torch.Tensor,
        whole: torch.Tensor,
        apart: torch.Tensor,
    ) -> torch.Tensor:
        """At least the scores (n, Q) of the rows that the codes stand for; NaN where something is.

        Args:
            numerators: (n, Q), x H ŷ / √(xᵀ H x).
            squares: (n,) ‖ŷ‖².
            inner: (n,) ŷᵀ H ŷ.
            whole: (n,) ‖y‖².
            apart: (n,) at most the distance from ŷ.
        """
        most = numerators + apart[:, None] * self.reach + squares.sqrt()[:, None] * self.rounding
        least = (inner - self.slack * squares).clamp_min(0).sqrt() - apart
        norm = (inner + self.slack * squares).clamp_min(0).sqrt() + apart
        bound = most / torch.where(most > 0, least[:, None], norm[:, None])
        bound = torch.where((most > 0) & (least[:, None] <= 0), 1.0, bound).clamp_max(1)
        return torch.where(whole[:, None] == 0, 0.0, bound) + SCORE_ERROR

    def off(
        self,
        numerators: torch.Tensor,
        squares: torch.Tensor,
        inner: torch.Tensor,
        whole: torch.Tensor,
        d: int,
    ) -> torch.Tensor:
        """At most how far (n, Q) the scores of narrow rows are from those of the rows encoded, of ``d`` numbers.

        The other arguments are those of :meth:`above`.
        """
        scores = numerators * inverse_root(inner + (whole - squares).clamp_min(0))[:, None]
        apart = distances(whole, squares, torch.float32, d)
        above = self.above(numerators, squares, inner, whole, apart) - scores
        below = self.above(-numerators, squares, inner, whole, apart) + scores
        return torch.maximum(above, below)


def product_bounds(
    queries: torch.Tensor, codes: torch.Tensor, squared_norms: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """(Q, n): how far the inner products of queries with n narrow rows may be from those of the rows encoded."""
    _, L, d = queries.shape
    bounds = queries.new_zeros(len(queries), len(codes), dtype=torch.float64)
    unit = 2.0**-23 * (512 + d / 128 + 2 * L)
    for b in range(L):
        norms = queries[:, b].double().norm(dim=1)
        whole = squared_norms[:, b].double()
        squares = _decoded(codes, scales, b, d).square().sum(1)
        apart = distances(whole, squares, torch.float32, d) + unit * whole.sqrt()
        bounds.addr_(norms, apart)
    return bounds


def mixed_bounds(
    queries: torch.Tensor,
    mixing: float,
    codes: torch.Tensor,
    squared_norms: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """(Q, n): how far the mixed scores of n narrow rows may be from those of the rows encoded."""
    hessian = Hessian(queries, mixing, slice(None))
    task = TaskBounds.of(hessian)
    numerators = queries.new_zeros(len(codes), len(queries), dtype=torch.float64)
    query_squares = queries.new_zeros(len(queries), dtype=torch.float64)
    squares, inner = (queries.new_zeros(len(codes), dtype=torch.float64) for _ in range(2))
    for b, (factor, combine, square) in enumerate(hessian.blocks()):
        y = _decoded(codes, scales, b, queries.shape[2])
        t = y @ factor.T
        numerators.addmm_(t, combine.T)
        query_squares += square
        squares += y.square().sum(1)
        inner += hessian.base * y.square().sum(1) + hessian.sign * t.square().sum(1)
    numerators *= inverse_root(query_squares)
    whole = squared_norms.double().sum(1)
    return task.off(numerators, squares, inner, whole, queries[0].numel()).T


def _decoded(codes: torch.Tensor, scales: torch.Tensor, b: int, d: int) -> torch.Tensor:
    """Block b (n, d) of narrow rows, float64."""
    return decode_rows(codes[:, b : b + 1], scales[:, b : b + 1], d, torch.float64)[:, 0]
