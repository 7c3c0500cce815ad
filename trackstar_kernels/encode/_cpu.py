"""Whitening as one batched GEMM over blocks, which is all of its cost."""

import torch

from trackstar_kernels.encode._narrow import narrow_with_norms


def encode_rows(
    rows: torch.Tensor, whiteners: torch.Tensor | None, dtype: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See :func:`trackstar_kernels.encode_rows`."""
    if whiteners is None:
        return narrow_with_norms(rows, dtype)
    whitened = torch.empty_like(rows, memory_format=torch.contiguous_format)
    torch.bmm(rows.transpose(0, 1), whiteners.transpose(1, 2), out=whitened.transpose(0, 1))
    return narrow_with_norms(whitened, dtype)
