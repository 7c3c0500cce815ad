"""R_train: its accumulation, its inverse square root, and the paper's rule for mixing it with R_eval."""

import dataclasses
from collections.abc import Iterable

import torch

DAMPING = 0.1
"""δ_b relative to the mean eigenvalue of block b."""

MIXING_COMPONENT = 1000 / 65536
"""Which singular value, relative to D, the paper's rule makes R_eval and R_train agree on."""

MAX_MIXING = 0.99


@dataclasses.dataclass(frozen=True)
class Curvature:
    """Second-moment matrix of the training rows, damped, and what follows from it.

    Attributes:
        train: R_train (L, d, d) float64: mean of x xᵀ over the sample, plus damping.
        damping: δ (L,) float64, the multiple of I that ``train`` contains.
        eigenvalues: of ``train``, (L, d) float64, ascending in each block.
        whitener: R_train^(-1/2) (L, d, d) float32, symmetric.
    """

    train: torch.Tensor
    damping: torch.Tensor
    eigenvalues: torch.Tensor
    whitener: torch.Tensor


def accumulate(total: torch.Tensor, rows: torch.Tensor) -> None:
    """total[b] += Σ_n rows[n, b] rows[n, b]ᵀ; products in float32, sums in float64.

    Args:
        total: (L, d, d) float64, changed in place.
        rows: (n, L, d) float32.
    """
    for b in range(total.shape[0]):
        block = rows[:, b]
        total[b] += block.T @ block


def estimate_curvature(
    chunks: Iterable[torch.Tensor], blocks: int, size: int, damping: float = DAMPING
) -> Curvature:
    """R_train from chunks of rows (n, L, d).

    Raises:
        ValueError: a block is zero in every row, so that nothing can be whitened in it.
    """
    total = torch.zeros(blocks, size, size, dtype=torch.float64)
    count = 0
    for rows in chunks:
        accumulate(total, rows)
        count += len(rows)
    train = total / max(count, 1)
    mean_eigenvalue = train.diagonal(dim1=1, dim2=2).mean(dim=1)
    if not (mean_eigenvalue > 0).all():
        block = int((mean_eigenvalue <= 0).nonzero()[0])
        raise ValueError(f"the sample's gradients must not be zero throughout; they are in block {block}")
    delta = damping * mean_eigenvalue
    train.diagonal(dim1=1, dim2=2).add_(delta[:, None])
    eigenvalues, vectors = torch.linalg.eigh(train)
    eigenvalues = eigenvalues.clamp_min(delta[:, None])
    whitener = (vectors * eigenvalues.rsqrt()[:, None, :]) @ vectors.transpose(1, 2)
    return Curvature(train, delta, eigenvalues, whitener.float())


def choose_mixing(query_rows: torch.Tensor, eigenvalues: torch.Tensor) -> float:
    """λ at which the sorted singular values of λ R_eval and (1 − λ) R_train cross, by the paper's rule.

    λ = σ_train[k] / (σ_eval[k] + σ_train[k]) with k = 1000 of 65,536 components, scaled to D; where R_eval has
    fewer non-zero components (few queries), its last one; at most 0.99.

    Args:
        query_rows: (Q, L, d) projected gradients of the queries, not whitened.
        eigenvalues: (L, d) of R_train.

    Source: TrackStar, arXiv 2410.17413, section 3 and appendix on task-specific Hessians.
    """
    rows = query_rows.double().transpose(0, 1)
    # R_eval's non-zero eigenvalues are those of the (smaller) Gram matrix.
    gram = rows @ rows.transpose(1, 2) if rows.shape[1] <= rows.shape[2] else rows.transpose(1, 2) @ rows
    evaluation = (torch.linalg.eigvalsh(gram) / rows.shape[1]).flatten().sort(descending=True).values
    nonzero = int((evaluation > evaluation[0] * 1e-12).sum())
    train = eigenvalues.flatten().sort(descending=True).values
    k = min(max(round(MIXING_COMPONENT * train.numel()), 1), nonzero) - 1
    return min((train[k] / (evaluation[k] + train[k])).item(), MAX_MIXING)
