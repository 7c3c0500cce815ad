"""Whitening as its definition."""

import torch

from trackstar_kernels.encode._narrow import narrow_with_norms


def encode_rows(
    rows: torch.Tensor, whiteners: torch.Tensor | None, dtype: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See :func:`trackstar_kernels.encode_rows`."""
    return narrow_with_norms(
        rows if whiteners is None else torch.einsum("bij,nbj->nbi", whiteners, rows), dtype
    )
