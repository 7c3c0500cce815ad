"""Turning projected gradients into the rows of a store: whiten, take norms, narrow."""

import torch

from trackstar_kernels._checks import (
    check_backend,
    check_dtype,
    check_same_device,
    check_shape,
    check_tensor,
)
from trackstar_kernels._codes import DTYPES, NARROW, code_size
from trackstar_kernels._custom_ops import custom_op
from trackstar_kernels._dispatch import implementation, register

BACKENDS = register("encode_rows", {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")})


def encode_rows(
    rows: torch.Tensor,
    whiteners: torch.Tensor | None,
    dtype: str | torch.dtype,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Whitened rows in the dtype of a store, and their true norms: y[n, b] = whiteners[b] · rows[n, b].

    Narrow codes stand for y[n, b] ≈ scales[n, b] · codes[n, b]: the scale is the one that leaves the least of y behind,
    so that ‖y − ŷ‖² = ‖y‖² − ‖ŷ‖² for the decoded ŷ. :func:`trackstar_kernels.decode_rows` is the way back.

    Works under torch.compile and with fake tensors, as the custom op ``trackstar::encode_rows``.

    Args:
        rows: (N, L, d) projected gradients, float32 or float64.
        whiteners: (L, d, d) with whiteners[b]ᵀ whiteners[b] = R_b⁻¹, same dtype; None leaves rows as they are.
        dtype: "float32", "float16", "int8", "int4" or "sign", or the torch.dtype of that name.
        backend: None, "cpu", "triton" (float32 rows) or "reference".

    Returns:
        codes, scales, and squared_norms (N, L) float32, the norms ‖y[n, b]‖² before narrowing. The codes are, by
        dtype,

        - float32, float16: (N, L, d) of that dtype, and scales is None;
        - int8: (N, L, d) int8 from -127 to 127;
        - int4: (N, L, ⌈d/64⌉ + ⌈d/2⌉) uint8: for every 64 elements a byte with the multipliers of two groups of 32,
          then a byte for every two codes; they stand for whole numbers from -127 to 127, see encode/README.md;
        - sign: (N, L, ⌈d/32⌉) int32: bit i, from the lowest, of word j is 1 where element 32j + i is negative.

        Bits left over are 0. Narrow dtypes have scales (N, L) float32: 0 for a block of zeros, NaN for one that
        holds NaN or infinity.

    Raises:
        TypeError: an argument is not a tensor or of another dtype.
        ValueError: shapes do not fit, ``dtype`` is unknown, a value exceeds the largest float16, or the backend is
            unknown or not available.

    Source: TrackStar, arXiv 2410.17413, section 3 (R^(-1/2)).
    """
    check_tensor("rows", rows)
    check_dtype("rows", rows, torch.float32, torch.float64)
    check_shape("rows", rows, ("N", "L", "d"))
    if rows.shape[2] == 0:
        raise ValueError(f"rows must have blocks of at least one number, got shape {tuple(rows.shape)}")
    if whiteners is not None:
        check_tensor("whiteners", whiteners)
        check_dtype("whiteners", whiteners, rows.dtype)
        check_shape("whiteners", whiteners, (rows.shape[1], rows.shape[2], rows.shape[2]))
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    check_same_device(rows=rows, whiteners=whiteners)
    check_backend(backend)
    with torch.no_grad():
        codes, scales, squared_norms = _encode_rows(rows, whiteners, dtype, backend)
    return codes, scales if DTYPES[dtype] in NARROW else None, squared_norms


@custom_op("encode_rows")
def _encode_rows(
    rows: torch.Tensor, whiteners: torch.Tensor | None, dtype: str, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`encode_rows`, once shapes and dtypes are known to fit; scales are empty where there are none."""
    run = implementation(__name__, "encode_rows", rows.device, backend)
    codes, scales, squared_norms = run(rows, whiteners, dtype)
    if dtype == "float16" and codes.isinf().any():
        whitened, _, _ = run(rows, whiteners, "float32")
        lost = (codes.isinf() & whitened.isfinite()).any(dim=2)
        if lost.any():
            n, b = lost.nonzero()[0].tolist()
            largest = whitened[n, b].abs().max().item()
            raise ValueError(
                f"rows[{n}] reaches {largest:.3g} in block {b}, beyond float16's 65504: use dtype float32"
            )
    if codes.data_ptr() == rows.data_ptr():  # a custom op's results are its own
        codes = codes.clone()
    return codes, squared_norms.new_empty(0) if scales is None else scales, squared_norms


@torch.library.register_fake("trackstar::encode_rows")
def _(
    rows: torch.Tensor, whiteners: torch.Tensor | None, dtype: str, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    N, L, d = rows.shape
    code_dtype = DTYPES[dtype]
    scales = (N, L) if code_dtype in NARROW else (0,)
    float32 = torch.float32
    return (
        rows.new_empty(N, L, code_size(d, code_dtype), dtype=code_dtype),
        rows.new_empty(scales, dtype=float32),
        rows.new_empty(N, L, dtype=float32),
    )
