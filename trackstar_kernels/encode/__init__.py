"""Turning projected gradients into the rows of a store: whiten, take norms, narrow."""

import torch

from trackstar_kernels._checks import check_dtype, check_same_device, check_shape, check_tensor
from trackstar_kernels._dispatch import implementation, register

BACKENDS = register("encode_rows", {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")})

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def encode_rows(
    rows: torch.Tensor,
    whiteners: torch.Tensor | None,
    dtype: str | torch.dtype,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Whitened rows in the dtype of a store, and their true norms: y[n, b] = whiteners[b] · rows[n, b].

    Args:
        rows: (N, L, d) projected gradients, float32 or float64.
        whiteners: (L, d, d) with whiteners[b]ᵀ whiteners[b] = R_b⁻¹, same dtype; None leaves rows as they are.
        dtype: "float32" or "float16", or the torch.dtype of that name.
        backend: None, "cpu", "triton" (float32 rows) or "reference".

    Returns:
        codes (N, L, d) of ``dtype``; scales, None for these dtypes; squared_norms (N, L) float32, the norms
        ‖y[n, b]‖² before narrowing.

    Raises:
        TypeError: an argument is not a tensor or of another dtype.
        ValueError: shapes do not fit, ``dtype`` is unknown, a value exceeds the largest float16, or the backend is
            unknown or not available.

    Source: TrackStar, arXiv 2410.17413, section 3 (R^(-1/2)).
    """
    check_tensor("rows", rows)
    check_dtype("rows", rows, torch.float32, torch.float64)
    check_shape("rows", rows, ("N", "L", "d"))
    if whiteners is not None:
        check_tensor("whiteners", whiteners)
        check_dtype("whiteners", whiteners, rows.dtype)
        check_shape("whiteners", whiteners, (rows.shape[1], rows.shape[2], rows.shape[2]))
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    device = check_same_device(rows=rows, whiteners=whiteners)
    run = implementation(__name__, "encode_rows", device, backend)
    codes, squared_norms = run(rows, whiteners, DTYPES[dtype])
    if dtype == "float16" and codes.isinf().any():
        whitened, _ = run(rows, whiteners, torch.float32)
        lost = (codes.isinf() & whitened.isfinite()).any(dim=2)
        if lost.any():
            n, b = lost.nonzero()[0].tolist()
            largest = whitened[n, b].abs().max().item()
            raise ValueError(
                f"rows[{n}] reaches {largest:.3g} in block {b}, beyond float16's 65504: use dtype float32"
            )
    return codes, None, squared_norms
