"""The order of results, and merging."""

from collections.abc import Sequence

import torch

from trackstar_kernels import _C


def merge_topk(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]], k: int, largest: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of several results for the same queries, such as those of a store's shards.

    Better scores first, equal scores by index, NaN scores after every number: the order of every result here,
    so that merging in any grouping gives the result of scoring everything at once.

    Args:
        parts: at least one (scores (Q, k_i), indices (Q, k_i) int64), with no index in two of them.
        k: results wanted per query, at least 1.
        largest: whether larger scores are better.

    Returns:
        scores and indices, (Q, k), or as many results as the parts hold together if that is less.

    Raises:
        ValueError: there are no parts.
    """
    if not parts:
        raise ValueError("parts must hold at least one result, got none")
    if all(
        scores.dtype == torch.float32 and scores.device.type == "cpu" and scores.numel() > 0
        for scores, *_ in parts
    ):
        return _merged(parts, k, largest)
    scores = torch.cat([part[0] for part in parts], 1)
    indices = torch.cat([part[1] for part in parts], 1)
    order = best_first(scores, indices, largest)[:, :k]
    return scores.gather(1, order), indices.gather(1, order)


def best_first(scores: torch.Tensor, indices: torch.Tensor, largest: bool) -> torch.Tensor:
    """Where the best result of each query (Q, n) stands, the next best, and so on: the definition of their order."""
    worst = -torch.inf if largest else torch.inf
    # Stable sorts, from the last criterion to the first.
    order = indices.argsort(1)
    by_score = scores.nan_to_num(worst, torch.inf, -torch.inf).gather(1, order)
    order = order.gather(1, by_score.argsort(dim=1, descending=largest, stable=True))
    return order.gather(1, scores.isnan().gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))


def _merged(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]], k: int, largest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`merge_topk` of float32 results, in C++: a scan merges after every piece."""
    held = [(scores.contiguous(), indices.contiguous()) for scores, indices, *_ in parts]
    Q, k = len(held[0][0]), min(k, sum(scores.shape[1] for scores, _ in held))
    for scores, indices in held:
        if scores.shape[0] != Q or indices.shape != scores.shape or indices.dtype != torch.int64:
            raise ValueError(
                f"parts must be scores (Q, k) and int64 indices (Q, k) of the same Q (={Q}), got"
                f" {tuple(scores.shape)} and {indices.dtype} {tuple(indices.shape)}"
            )
    best = torch.empty(Q, k), torch.empty(Q, k, dtype=torch.int64)
    found = [_C.Found(scores.data_ptr(), indices.data_ptr(), scores.shape[1]) for scores, indices in held]
    _C.merge_topk(found, _C.TopK(Q, k, largest, best[0].data_ptr(), best[1].data_ptr(), 0))
    return best
