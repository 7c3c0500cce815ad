"""Scores that are plain products, w_m · Σ_b ⟨a_q,b, y_m,b⟩ with the whitened rows y = B x of a store.

What was whitened can be scored as if it had not been, x_q·x_m = (B⁻ᵀ x_q)·(B x_m), with no other store: the queries
take the whitener back for both sides.
"""

from collections.abc import Callable

import torch

from trackstar.curvature import Curvature
from trackstar_kernels import decode_rows

Weigh = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(rows (n,) int64, codes, scales) of a piece to the scales (n,) or (n, L) float32 that weigh its rows too."""


def unwhitening_queries(rows: torch.Tensor, curvature: Curvature, *, unit_norm: bool = False) -> torch.Tensor:
    """B⁻ᵀ x of queries x (Q, L, d), computed in float64, float32; divided by ‖x‖ where ``unit_norm``.

    Their products with a store's rows B x_m are those of x with the x_m. A query of zeros stays one.
    """
    found = torch.empty_like(rows)
    for b, whitener in enumerate(curvature.whitener):
        found[:, b] = torch.linalg.solve(whitener.double().T, rows[:, b].double().T).T
    if unit_norm:
        norms = rows.double().flatten(1).norm(dim=1)
        found *= torch.where(norms > 0, 1 / norms, 0)[:, None, None]
    return found


def by_unwhitened_norm(curvature: Curvature, device: torch.device) -> Weigh:
    """Weighs row m by 1/‖x_m‖ with x = B⁻¹ y, the norm it had before it was whitened; rows of zeros by 0.

    Products in float32, d of them for each number of a row: as much as d queries' scores.
    """
    L, d, _ = curvature.whitener.shape
    unwhitener = torch.empty(L, d, d, device=device)
    for b, whitener in enumerate(curvature.whitener):
        unwhitener[b] = torch.linalg.inv(whitener.double())

    def weigh(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        squares = torch.zeros(len(codes), dtype=torch.float64, device=device)
        for b in range(L):
            block = decode_rows(codes[:, b : b + 1], None if scales is None else scales[:, b : b + 1], d)[
                :, 0
            ]
            squares += (block @ unwhitener[b].T).square().sum(1)
        return _weighed(torch.where(squares > 0, squares.rsqrt(), 0), scales)

    return weigh


def by_weight(weights: torch.Tensor, device: torch.device) -> Weigh:
    """Weighs row m of the store by weights[m], given (end,) float32."""
    return lambda rows, codes, scales: _weighed(weights[rows].to(device), scales)


def _weighed(weights: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return weights.float() if scales is None else scales * weights.float()[:, None]
