"""The order of results, and merging."""

from collections.abc import Sequence

import torch


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
    scores = torch.cat([part[0] for part in parts], 1)
    indices = torch.cat([part[1] for part in parts], 1)
    worst = -torch.inf if largest else torch.inf
    # Stable sorts, from the last criterion to the first.
    order = indices.argsort(1)
    by_score = scores.nan_to_num(worst, torch.inf, -torch.inf).gather(1, order)
    order = order.gather(1, by_score.argsort(dim=1, descending=largest, stable=True))
    order = order.gather(1, scores.isnan().gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    order = order[:, :k]
    return scores.gather(1, order), indices.gather(1, order)
