"""Per-example gradients, corrected by the optimizer's scale and projected from both sides."""

import torch

from trackstar_kernels._checks import (
    check_backend,
    check_dtype,
    check_flag,
    check_same_device,
    check_shape,
    check_tensor,
)
from trackstar_kernels._custom_ops import custom_op
from trackstar_kernels._dispatch import implementation, register

BACKENDS = register("project_gradients", {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")})

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def project_gradients(
    activations: torch.Tensor,
    output_grads: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    backend: str | None = None,
    check_finite: bool = True,
) -> torch.Tensor:
    """Sketches of a linear layer's gradient, one per example, without forming the gradients.

    With X the activations and Δ the output gradients of example b::

        out[b] = Σ_r left[r] · (Δᵀ X ∘ scale) · right[r]ᵀ

    The three optimizer corrections are three uses of it. None: one pair of sketches, no scale. Rank r,
    V^(-1/2) ≈ Σ_r u_r v_rᵀ: left[r] = P_L diag(u_r), right[r] = P_R diag(v_r), no scale. Exact:
    scale = 1 / (√V + eps).

    An example's row depends on its own tokens alone. On one machine it is bit-identical whether the example
    comes by itself, in another batch, padded at its end with rows of zeros, or packed, and with any number of
    threads (backends "cpu" and "triton"). An example without tokens gives zeros.

    Works under torch.compile and with fake tensors, as the custom op ``trackstar::project_gradients``. It is not
    differentiable.

    Args:
        activations: (B, T, I) inputs of the layer; or (ΣT, I), all examples' tokens end to end, with offsets.
        output_grads: (B, T, O) or (ΣT, O) gradients of the loss by the layer's outputs, dtype of activations.
        left: (q, O) or (r, q, O).
        right: (p, I) or (r, p, I), the same r.
        scale: (O, I) or None.
        offsets: (B + 1,) int32 or int64, for packed input only: where each example's tokens begin and, last,
            where they end, ascending from 0 to ΣT. On any device; the values are read on the host.
        backend: None, "cpu" or "triton" (float32, bfloat16 or float16) or "reference" (float64 too).
        check_finite: refuse inputs with NaN or infinity, before anything runs; costs one sum over each of them,
            and on a GPU a wait. False lets them through: they reach their example's row and no other.

    activations may be float32, bfloat16, float16 or float64; the sketches and scale that dtype or float32.
    All are widened to float32 first, and the sums are in float32; with float64 activations, both in float64.

    Returns:
        (B, q, p) float32 tensor; float64 with float64 activations.

    Raises:
        TypeError: an argument is not a tensor or has another dtype, or the backend does not take the dtype.
        ValueError: shapes, devices or offsets do not fit, the backend is unknown or not available, or an input
            is not finite (a scale is infinite where a second moment is zero); the input and the place are named.

    Source: TrackStar, arXiv 2410.17413, section 3 (optimizer correction, two-sided projection).
    """
    activations, output_grads = (
        check_tensor("activations", activations),
        check_tensor("output_grads", output_grads),
    )
    left, right = check_tensor("left", left), check_tensor("right", right)
    check_dtype("activations", activations, *DTYPES)
    check_dtype("output_grads", output_grads, activations.dtype)
    check_shape("activations", activations, ("B", "T", "I") if offsets is None else ("ΣT", "I"))
    *tokens, in_features = activations.shape
    check_shape("output_grads", output_grads, (*tokens, "O"))
    out_features = output_grads.shape[-1]
    check_shape("left", left, ("q", out_features), ("r", "q", out_features))
    check_shape("right", right, (*left.shape[:-2], "p", in_features))
    constants = {"left": left, "right": right}
    if scale is not None:
        constants["scale"] = check_tensor("scale", scale)
        check_shape("scale", scale, (out_features, in_features))
    for name, constant in constants.items():
        check_dtype(name, constant, *dict.fromkeys((torch.float32, activations.dtype)))
    check_same_device(activations=activations, output_grads=output_grads, **constants)
    if offsets is not None:
        check_dtype("offsets", check_tensor("offsets", offsets), torch.int32, torch.int64)
        check_shape("offsets", offsets, ("B + 1",))
        if len(offsets) == 0:
            raise ValueError("offsets must have at least one element, got none")
    check_backend(backend)
    check_flag("check_finite", check_finite)
    with torch.no_grad():
        return _project_gradients(
            activations, output_grads, left, right, scale, offsets, backend, check_finite
        )


@custom_op("project_gradients")
def _project_gradients(
    activations: torch.Tensor,
    output_grads: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor | None,
    offsets: torch.Tensor | None,
    backend: str | None,
    check_finite: bool,
) -> torch.Tensor:
    """What the public function does once shapes and dtypes are known to fit: all that looks at values."""
    if offsets is not None:
        offsets = _check_offsets(offsets, len(activations))
    run = implementation(__name__, "project_gradients", activations.device, backend)
    if check_finite:
        named = {"activations": activations, "output_grads": output_grads, "left": left, "right": right}
        _check_values(named if scale is None else named | {"scale": scale})
    out = run(
        activations, output_grads, *(s if s.ndim == 3 else s[None] for s in (left, right)), scale, offsets
    )
    if check_finite and not out.isfinite().all():
        raise ValueError("the inputs are finite, but their projected gradient exceeds the largest float32")
    return out


@torch.library.register_fake("trackstar::project_gradients")
def _(
    activations: torch.Tensor,
    output_grads: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor | None,
    offsets: torch.Tensor | None,
    backend: str | None,
    check_finite: bool,
) -> torch.Tensor:
    batch = activations.shape[0] if offsets is None else offsets.shape[0] - 1
    dtype = torch.promote_types(activations.dtype, torch.float32)
    return activations.new_empty(batch, left.shape[-2], right.shape[-2], dtype=dtype)


def _check_values(inputs: dict[str, torch.Tensor]) -> None:
    """Require finite inputs; names the first that is not, and where."""
    # A finite sum has finite terms, and costs a fraction of looking at them.
    sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in inputs.values()]
    if torch.stack([total.double() for total in sums]).isfinite().all():
        return
    for name, tensor in inputs.items():
        if (finite := tensor.isfinite()).all():
            continue
        place = finite.logical_not().nonzero()[0].tolist()
        why = ": a second moment is zero" if name == "scale" and tensor[tuple(place)].isinf() else ""
        raise ValueError(f"{name} must be finite, got {tensor[tuple(place)].item()} at {place}{why}")


def _check_offsets(offsets: torch.Tensor, tokens: int) -> torch.Tensor:
    """The offsets as int64 on the host, if they cut ``tokens`` tokens into examples."""
    offsets = offsets.to("cpu", torch.int64)
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(
            f"offsets must run from 0 to the {tokens} tokens of activations, "
            f"got {offsets[0].item()} to {offsets[-1].item()}"
        )
    descents = (offsets.diff() < 0).nonzero()
    if len(descents) > 0:
        at = int(descents[0]) + 1
        raise ValueError(f"offsets must ascend, got {offsets[at - 1]} before {offsets[at]} at position {at}")
    return offsets
