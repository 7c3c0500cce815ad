"""The definition, one example at a time: form the gradient, correct it, project it."""

import torch


def project_gradients(
    activations: torch.Tensor,
    output_grads: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`trackstar_kernels.project_gradients`."""
    dtype = torch.promote_types(activations.dtype, torch.float32)
    activations, output_grads, left, right = (t.to(dtype) for t in (activations, output_grads, left, right))
    if offsets is None:
        examples = list(zip(activations, output_grads, strict=True))
    else:
        lengths = offsets.diff().tolist()
        examples = list(zip(activations.split(lengths), output_grads.split(lengths), strict=True))
    out = activations.new_zeros(len(examples), left.shape[1], right.shape[1])
    for row, (x, delta) in zip(out, examples, strict=True):
        gradient = delta.T @ x
        if scale is not None:
            gradient = gradient * scale.to(dtype)
        row += (left @ gradient @ right.mT).sum(0)
    return out
