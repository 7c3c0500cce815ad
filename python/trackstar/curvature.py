"""R_train: its accumulation, its inverse square root, and the paper's rule for mixing it with R_eval."""

import dataclasses
import functools
from collections.abc import Iterable

import torch

from trackstar_kernels import projection_matrix

DAMPING = 0.1
"""δ_b relative to the mean eigenvalue of block b."""

MIXING_COMPONENT = 1000 / 65536
"""Which singular value, relative to D, the paper's rule makes R_eval and R_train agree on."""

MAX_MIXING = 0.99

DOMINANT = 0.5
"""Part of a block's trace that a single row may hold without a warning."""

ROTATION_SEED = 0
"""Seed of the rotation of narrow stores' whiteners."""


@dataclasses.dataclass(frozen=True)
class Curvature:
    """Second-moment matrix of the training rows, damped, and what follows from it.

    Any whitener B with BᵀB = R_train⁻¹ gives the same scores. Stores of narrow dtypes take a random rotation of the
    symmetric one, which spreads what a row holds over its coordinates, so that narrowing loses less of it.

    Attributes:
        train: R_train (L, d, d) float64: mean of x xᵀ over the sample, plus damping.
        damping: δ (L,) float64, the multiple of I that ``train`` contains.
        eigenvalues: of ``train``, (L, d) float64, ascending in each block.
        whitener: B (L, d, d) float32: R_train^(-1/2), symmetric, or :func:`rotation` times it.
        rotated: which of the two.
    """

    train: torch.Tensor
    damping: torch.Tensor
    eigenvalues: torch.Tensor
    whitener: torch.Tensor
    rotated: bool = False

    def with_rotation(self, rotated: bool) -> "Curvature":
        """The same with the whitener rotated, or symmetric."""
        if rotated == self.rotated:
            return self
        turn = rotation(self.whitener.shape[1])
        whitener = (turn if rotated else turn.T) @ self.whitener.double()
        return dataclasses.replace(self, whitener=whitener.float(), rotated=rotated)

    def whitening_from(self, old: "Curvature") -> torch.Tensor:
        """B B_old⁻¹ (L, d, d) float32, which turns rows that are whitened by ``old`` into rows whitened by this."""
        # B_old⁻¹ = R_old B_oldᵀ, because B_oldᵀ B_old = R_old⁻¹.
        return (self.whitener.double() @ old.train @ old.whitener.double().mT).float()


@functools.lru_cache(maxsize=1)
def rotation(size: int) -> torch.Tensor:
    """Random rotation (d, d) float64: Q of the QR decomposition of a Gaussian matrix, the diagonal of R positive.

    The matrix is ``projection_matrix(d, d, seed=ROTATION_SEED, stream=0, kind="gaussian")``, which makes Q uniformly
    distributed over the orthogonal matrices, and the same on every machine up to rounding.
    """
    gaussian = projection_matrix(
        size, size, seed=ROTATION_SEED, stream=0, kind="gaussian", dtype=torch.float64
    )
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def accumulate(total: torch.Tensor, rows: torch.Tensor) -> None:
    """total[b] += Σ_n rows[n, b] rows[n, b]ᵀ; products in float32, sums in float64.

    Args:
        total: (L, d, d) float64, changed in place.
        rows: (n, L, d) float32.
    """
    for b in range(total.shape[0]):
        block = rows[:, b]
        total[b] += block.T @ block


class SecondMoment:
    """Mean of x xᵀ in each block over rows that come chunk by chunk, and what makes it untrustworthy.

    Attributes:
        count: rows so far.
        reached: rows so far that are not zero in each block, (L,) int64.
        largest: ‖x‖² of each block's longest row so far, (L,) float64.
    """

    def __init__(self, blocks: int, size: int) -> None:
        self._total = torch.zeros(blocks, size, size, dtype=torch.float64)
        self.count = 0
        self.reached = torch.zeros(blocks, dtype=torch.int64)
        self.largest = torch.zeros(blocks, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        """Take in rows (n, L, d) float32."""
        accumulate(self._total, rows)
        self.count += len(rows)
        squares = rows.square().sum(2).double()
        self.reached += (squares > 0).sum(0)
        self.largest = torch.maximum(self.largest, squares.amax(0)) if len(rows) else self.largest

    @property
    def mean(self) -> torch.Tensor:
        """(L, d, d) float64, a copy."""
        return self._total / max(self.count, 1)

    @property
    def largest_shares(self) -> torch.Tensor:
        """The longest row's part of the trace of each block, (L,) float64."""
        return self.largest / self._total.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300)

    def doubts(self) -> str | None:
        """What to warn of, in a line: too few rows for the dimensions, or one row that outweighs all others."""
        blocks, size = self._total.shape[:2]
        found = []
        if (self.reached < size).any():
            thin = int((self.reached < size).sum())
            found.append(
                f"it is rank-deficient in {thin} of {blocks} blocks (as few as {int(self.reached.min())} rows for "
                f"{size} dimensions), where damping decides in what is left; take more examples or a smaller sketch"
            )
        shares = self.largest_shares
        if self.count > 1 and (shares > DOMINANT).any():
            found.append(
                f"one row holds {shares.max():.0%} of the trace of block {int(shares.argmax())}, and more than "
                f"{DOMINANT:.0%} in {int((shares > DOMINANT).sum())} of {blocks} blocks; look for an outlier"
            )
        return f"R_train is of {self.count} rows: {'; '.join(found)}" if found else None


def estimate_curvature(
    chunks: Iterable[torch.Tensor], blocks: int, size: int, *, rotated: bool = False, damping: float = DAMPING
) -> Curvature:
    """R_train from chunks of rows (n, L, d).

    Raises:
        ValueError: a block is zero in every row, so that nothing can be whitened in it.
    """
    moment = SecondMoment(blocks, size)
    for rows in chunks:
        moment.add(rows)
    return damped_curvature(moment.mean, rotated=rotated, damping=damping)


def damped_curvature(moment: torch.Tensor, *, rotated: bool, damping: float = DAMPING) -> Curvature:
    """R_train = ``moment`` + δ I, δ ``damping`` times the mean eigenvalue, and what follows from it.

    Args:
        moment: mean of x xᵀ in each block, (L, d, d) float64; becomes R_train in place.
        rotated: see :class:`Curvature`.
        damping: δ relative to the mean eigenvalue.

    Raises:
        ValueError: a block is zero, or not finite.
    """
    mean_eigenvalue = moment.diagonal(dim1=1, dim2=2).mean(dim=1)
    if not mean_eigenvalue.isfinite().all():
        raise ValueError("the sample's gradients must be finite, got NaN or infinity")
    if not (mean_eigenvalue > 0).all():
        block = int((mean_eigenvalue <= 0).nonzero()[0])
        raise ValueError(f"the sample's gradients must not be zero throughout; they are in block {block}")
    delta = damping * mean_eigenvalue
    moment.diagonal(dim1=1, dim2=2).add_(delta[:, None])
    eigenvalues, vectors = torch.linalg.eigh(moment)
    eigenvalues = eigenvalues.clamp_min(delta[:, None])
    whitener = (vectors * eigenvalues.rsqrt()[:, None, :]) @ vectors.mT
    if rotated:
        whitener = rotation(whitener.shape[1]) @ whitener
    return Curvature(moment, delta, eigenvalues, whitener.float(), rotated)


def choose_mixing(query_rows: torch.Tensor, eigenvalues: torch.Tensor) -> float:
    """λ at which the sorted singular values of λ R_eval and (1 − λ) R_train cross, by the paper's rule.

    λ = σ_train[k] / (σ_eval[k] + σ_train[k]) with k = 1000 of 65,536 components, scaled to D; where R_eval has
    fewer non-zero components (few queries), its last one; at most 0.99.

    Args:
        query_rows: (Q, L, d) projected gradients of the queries, not whitened.
        eigenvalues: (L, d) of R_train.

    Source: TrackStar, arXiv 2410.17413, section 3 and appendix on task-specific Hessians.
    """
    evaluation = torch.cat([_eigenvalues_of_moment(block.double()) for block in query_rows.unbind(1)])
    evaluation = evaluation.sort(descending=True).values
    nonzero = int((evaluation > evaluation[0] * 1e-12).sum())
    train = eigenvalues.flatten().sort(descending=True).values
    k = min(max(round(MIXING_COMPONENT * train.numel()), 1), nonzero) - 1
    return min((train[k] / (evaluation[k] + train[k])).item(), MAX_MIXING)


def _eigenvalues_of_moment(rows: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of the mean of x xᵀ over rows (Q, d), as many as may be non-zero."""
    # The smaller Gram matrix has them all.
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    return torch.linalg.eigvalsh(gram) / len(rows)
