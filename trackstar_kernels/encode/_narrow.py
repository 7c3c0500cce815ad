"""The end of every encoding that has whitened rows at hand."""

import torch


def narrow(whitened: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (N, L, d) in ``dtype``, and their squared norms (N, L) before narrowing, summed in float64, as float32."""
    return whitened.to(dtype), whitened.square().sum(dim=2, dtype=torch.float64).float()
