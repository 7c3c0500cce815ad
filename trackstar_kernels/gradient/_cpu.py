"""The C++ kernel (csrc/gradient.h)."""

import torch

from trackstar_kernels import _C


def project_gradients(
    activations: torch.Tensor,
    output_grads: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`trackstar_kernels.project_gradients`."""
    if activations.dtype == torch.float64:
        raise TypeError("backend 'cpu' computes in float32; for float64 activations use backend='reference'")
    if offsets is None:
        batch, tokens = activations.shape[:2]
        offsets = torch.arange(batch + 1) * tokens
    activations, output_grads = activations.contiguous(), output_grads.contiguous()
    left, right = (sketch.to(torch.float32).contiguous() for sketch in (left, right))
    if scale is not None:
        scale = scale.to(torch.float32).contiguous()
    offsets = offsets.contiguous()
    rank, q, out_features = left.shape
    p, in_features = right.shape[1:]
    out = torch.empty(len(offsets) - 1, q, p)
    _C.project_gradients(
        batch=len(out),
        in_features=in_features,
        out_features=out_features,
        rank=rank,
        q=q,
        p=p,
        element=str(activations.dtype).removeprefix("torch."),
        activations=activations.data_ptr(),
        output_grads=output_grads.data_ptr(),
        offsets=offsets.data_ptr(),
        left=left.data_ptr(),
        right=right.data_ptr(),
        scale=0 if scale is None else scale.data_ptr(),
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out
