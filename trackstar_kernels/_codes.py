"""How the rows of a store are coded: what encode_rows writes and the scoring ops read.

A block of d numbers is kept as y ≈ scale · code. The dtype of the codes alone tells how they are packed:

    float32, float16   the numbers themselves, without scales
    int8               whole numbers from -127 to 127
    uint8  ("int4")    whole numbers from -7 to 7 in two's complement, two a byte, the even element in the low bits
    int32  ("sign")    1 where a number is negative, 32 a word from the lowest bit

What is left over of a block's last byte or word is zero.
"""

import torch

from trackstar_kernels._checks import check_count, check_dtype, check_same_device, check_shape, check_tensor

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int8": torch.int8,
    "int4": torch.uint8,
    "sign": torch.int32,
}
NARROW = (torch.int8, torch.uint8, torch.int32)


def code_size(size: int, dtype: torch.dtype) -> int:
    """Numbers of ``dtype`` that hold the codes of ``size`` elements."""
    return -(-size // {torch.uint8: 2, torch.int32: 32}.get(dtype, 1))


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Whole numbers (…, d) from -7 to 7 as uint8 (…, ⌈d/2⌉)."""
    nibbles = torch.nn.functional.pad(values.to(torch.int8), (0, values.shape[-1] % 2)).view(torch.uint8) & 15
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def pack_signs(values: torch.Tensor) -> torch.Tensor:
    """Which of (…, d) are negative, as int32 (…, ⌈d/32⌉)."""
    bits = torch.nn.functional.pad((values < 0).to(torch.int32), (0, -values.shape[-1] % 32))
    places = torch.arange(32, dtype=torch.int32, device=values.device)
    return (bits.unflatten(-1, (-1, 32)) << places).sum(-1, dtype=torch.int32)


def unpack(codes: torch.Tensor, size: int) -> torch.Tensor:
    """The numbers (…, size) that codes of any dtype stand for, before scaling: narrow ones as int8."""
    if codes.dtype == torch.uint8:
        nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :size]
        return (nibbles ^ 8).to(torch.int8) - 8
    if codes.dtype == torch.int32:
        places = torch.arange(32, dtype=torch.int32, device=codes.device)
        bits = (codes[..., None] >> places).flatten(-2)[..., :size] & 1
        return 1 - 2 * bits.to(torch.int8)
    return codes


def decode_rows(
    codes: torch.Tensor, scales: torch.Tensor | None, size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The rows (N, L, size) in ``dtype`` that the codes of :func:`trackstar_kernels.encode_rows` stand for.

    Args:
        codes: (N, L, …), as encode_rows returns them; or bfloat16 rows.
        scales: (N, L), (N, 1) or None; floating-point.
        size: d, the numbers of a block.
        dtype: of the result, in which the product scale · code is rounded; floating-point.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: codes do not hold blocks of ``size`` numbers, or scales are not for them.
    """
    check_dtype("codes", check_tensor("codes", codes), torch.bfloat16, torch.float64, *DTYPES.values())
    check_shape("codes", codes, ("N", "L", code_size(check_count("size", size, 0), codes.dtype)))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    if scales is not None:
        check_shape("scales", check_tensor("scales", scales), tuple(codes.shape[:2]), (len(codes), 1))
        check_dtype("scales", scales, torch.float32, torch.float64)
        check_same_device(codes=codes, scales=scales)
    rows = unpack(codes, size).to(dtype)
    return rows if scales is None else rows * scales[:, :, None].to(dtype)
