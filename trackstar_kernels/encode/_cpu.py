"""Whitening as one batched GEMM over blocks, which is all of its cost."""

import torch


def encode_rows(rows: torch.Tensor, whiteners: torch.Tensor | None) -> torch.Tensor:
    """Whitened rows (N, L, d) in the dtype of ``rows``; see :func:`trackstar_kernels.encode_rows`."""
    if whiteners is None:
        return rows
    whitened = torch.empty_like(rows, memory_format=torch.contiguous_format)
    torch.bmm(rows.transpose(0, 1), whiteners.transpose(1, 2), out=whitened.transpose(0, 1))
    return whitened
