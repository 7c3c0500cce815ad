"""Whitening as its definition."""

import torch

from trackstar_kernels.encode._narrow import narrow


def encode_rows(
    rows: torch.Tensor, whiteners: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and squared norms; see :func:`trackstar_kernels.encode_rows`."""
    return narrow(rows if whiteners is None else torch.einsum("bij,nbj->nbi", whiteners, rows), dtype)
