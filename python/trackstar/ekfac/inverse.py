"""(G + λI)⁻¹ applied to a query's gradient, whole or as a product of two thin matrices."""

import torch

from trackstar.ekfac.factors import Factors
from trackstar_kernels import projection_matrix

OVERSAMPLING = 8
"""Columns by which the range of a matrix is sampled beyond the wanted rank."""

POWER_ITERATIONS = 2
"""Times that the sampled range is multiplied by M Mᵀ, which turns it towards the largest singular vectors."""


class DampedInverse:
    """The inverse of damped factors.

        (G + λI)⁻¹ g = Q_S ((Q_Sᵀ g Q_A) / (Λ + λ)) Q_Aᵀ,  λ = damping · mean Λ  of each matrix

    Args:
        factors: complete factors.
        damping: λ relative to the mean eigenvalue, above 0.
        device: where it is applied.
    """

    def __init__(self, factors: Factors, damping: float, device: torch.device) -> None:
        self._factors = factors
        self._damping = damping
        self._device = device

    def whole(self, name: str, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """(G + λI)⁻¹ g (O, I) of the gradient g = Σ_t δ_t x_tᵀ, for a module's x (n, I) and δ (n, O)."""
        by_input, by_output = self._basis(name)
        return by_output @ self._scaled(name, x @ by_input, delta @ by_output) @ by_input.T

    def thin(
        self, name: str, x: torch.Tensor, delta: torch.Tensor, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """U (O, r) and V (I, r) with U Vᵀ ≈ :meth:`whole`, the best of rank r = min(rank, O, I) or close to it."""
        by_input, by_output = self._basis(name)
        # Rotations do not change what is best, so the basis is left when the matrices are thin.
        left, right = low_rank(self._scaled(name, x @ by_input, delta @ by_output), rank)
        return by_output @ left, by_input @ right

    def _scaled(self, name: str, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        eigenvalues = self._factors.eigenvalues(name).to(self._device)
        return (delta.T @ x).div_(eigenvalues + self._damping * eigenvalues.mean())

    def _basis(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        by_input, by_output = self._factors.basis(name)
        return by_input.to(self._device), by_output.to(self._device)


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U (rows, r) and V (cols, r) with U Vᵀ ≈ matrix and r = min(rank, rows, cols); exact where r is its rank.

    The singular vectors are found within a sampled range. The sample is always the same, so the result is a function
    of the matrix alone.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53 (2011), algorithms 4.4
    and 5.1.
    """
    rows, cols = matrix.shape
    rank = min(rank, rows, cols)
    width = min(rank + OVERSAMPLING, rows, cols)
    sample = projection_matrix(width, cols, seed=0, stream=0, kind="gaussian", device=matrix.device)
    span = torch.linalg.qr(matrix @ sample.T).Q
    for _ in range(POWER_ITERATIONS):
        span = torch.linalg.qr(matrix.T @ span).Q
        span = torch.linalg.qr(matrix @ span).Q
    u, s, vh = torch.linalg.svd(span.T @ matrix, full_matrices=False)
    return span @ (u[:, :rank] * s[:rank]), vh[:rank].T
