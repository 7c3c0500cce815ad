"""The methods' scores by their definitions, dense and in full: what sweeps vary, and the engine is held against."""

import torch
from trackstar.curvature import DAMPING, choose_mixing


def scores(
    passages: torch.Tensor,
    questions: torch.Tensor,
    *,
    whitened: bool = True,
    unit_norm: bool = True,
    mixing: float = 0.0,
    damping: float = DAMPING,
    trained: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores (Q, N) float32 of every passage for every question.

        Σ_b x_qᵀ R_b⁻¹ x_m, with R = λ R_eval + (1 − λ) (R_train + δ I), and over the norms √(xᵀ R⁻¹ x) where asked for

    Args:
        passages: rows (N, L, d), not whitened.
        questions: rows (Q, L, d), not whitened.
        whitened: False leaves R out.
        unit_norm: False leaves the norms out.
        mixing: λ.
        damping: δ relative to the mean eigenvalue of R_train, in each block.
        trained: rows (M, L, d), not whitened, that R_train is of; None for ``passages``.

    Source: TrackStar, arXiv 2410.17413, sections 3 and 4.
    """
    products = torch.zeros(len(questions), len(passages), dtype=torch.float64)
    ours = torch.zeros(len(passages), dtype=torch.float64)
    theirs = torch.zeros(len(questions), dtype=torch.float64)
    for block in range(passages.shape[1]):
        x, q = passages[:, block].double(), questions[:, block].double()
        if whitened:
            # With R = C Cᵀ, C⁻¹ whitens as R^(-1/2) does.
            seen = x if trained is None else trained[:, block].double()
            half = torch.linalg.cholesky(_curvature(seen, q, mixing, damping))
            x, q = (torch.linalg.solve_triangular(half, rows.T, upper=False).T for rows in (x, q))
        products += q @ x.T
        ours += x.square().sum(1)
        theirs += q.square().sum(1)
    if unit_norm:
        products /= ours.sqrt() * theirs.sqrt()[:, None]
    return products.float()


def automatic_mixing(passages: torch.Tensor, questions: torch.Tensor, damping: float = DAMPING) -> float:
    """λ by the paper's rule."""
    return choose_mixing(questions, torch.stack([_spectrum(x.double(), damping) for x in passages.unbind(1)]))


def _spectrum(x: torch.Tensor, damping: float) -> torch.Tensor:
    """Eigenvalues (d,) of a block's damped R_train, of rows (N, d): the smaller Gram matrix has all but zeros."""
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    found = torch.zeros(x.shape[1], dtype=x.dtype)
    found[: len(gram)] = torch.linalg.eigvalsh(gram) / len(x)
    return found + damping * found.mean()


def _curvature(x: torch.Tensor, q: torch.Tensor, mixing: float, damping: float) -> torch.Tensor:
    train = x.T @ x / len(x)
    train.diagonal().add_(damping * train.diagonal().mean())
    return train if mixing == 0 else (1 - mixing) * train + mixing * (q.T @ q / len(q))


def ranking(scores: torch.Tensor, ids: list[str]) -> list[list[str]]:
    """Every question's passages by their ids, best first; ties in order."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return [[ids[i] for i in row] for row in order.tolist()]
