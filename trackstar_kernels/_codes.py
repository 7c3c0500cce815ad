"""How the rows of a store are coded: what encode_rows writes and the scoring ops read.

A block of d numbers is kept as y ≈ scale · code. The dtype of the codes alone tells how they are packed:

    float32, float16   the numbers themselves, without scales
    int8               whole numbers from -127 to 127
    uint8  ("int4")    whole numbers of which four bits and their group's multiplier tell, see :func:`pack_int4`
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

GROUP = 32
"""Elements of int4 that share a multiplier."""

MULTIPLIERS = 16
"""An int4 group's multiplier is from 1 to this."""

LEVELS = (0, 13, 26, 40, 55, 73, 94, 123, -127, -100, -79, -63, -48, -35, -23, -11)
"""What the 16 codes of int4 stand for in a group whose multiplier is the largest: the number of code c is
⌊(LEVELS[c] · multiplier + 8) / 16⌋. They lie where numbers of a normal distribution are lost least."""


def code_size(size: int, dtype: torch.dtype) -> int:
    """Numbers of ``dtype`` that hold the codes of ``size`` elements."""
    if dtype == torch.uint8:
        return -(-size // (2 * GROUP)) + -(-size // 2)
    return -(-size // 32) if dtype == torch.int32 else size


def pack_int4(codes: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """Codes (…, d) from 0 to 15 and multipliers (…, ⌈d/32⌉) as uint8 (…, ⌈d/64⌉ + ⌈d/2⌉).

    For every 64 elements a byte with the multipliers of two groups, less 1, and then their codes, two a byte. Of
    two, the first is in the low bits.
    """
    size = codes.shape[-1]
    packed = [_pairs(multipliers - 1, 2), _pairs(codes, 2 * GROUP).unflatten(-1, (-1, GROUP))]
    cells = torch.cat([packed[0][..., None], packed[1]], dim=-1)
    return cells.flatten(-2)[..., : code_size(size, torch.uint8)].contiguous()


def _pairs(nibbles: torch.Tensor, multiple: int) -> torch.Tensor:
    """Numbers (…, n) below 16 as uint8, two a byte, with zeros behind them up to a multiple of ``multiple``."""
    padded = torch.nn.functional.pad(nibbles.to(torch.uint8), (0, -nibbles.shape[-1] % multiple))
    return padded[..., 0::2] | padded[..., 1::2] << 4


def level_table(device: torch.device | None = None) -> torch.Tensor:
    """The numbers of int4's codes, int8 (multiplier - 1, code)."""
    multipliers = torch.arange(1, MULTIPLIERS + 1, device=device)[:, None]
    return (torch.tensor(LEVELS, device=device) * multipliers + 8 >> 4).to(torch.int8)


def pack_signs(values: torch.Tensor) -> torch.Tensor:
    """Which of (…, d) are negative, as int32 (…, ⌈d/32⌉)."""
    bits = torch.nn.functional.pad((values < 0).to(torch.int32), (0, -values.shape[-1] % 32))
    places = torch.arange(32, dtype=torch.int32, device=values.device)
    return (bits.unflatten(-1, (-1, 32)) << places).sum(-1, dtype=torch.int32)


def unpack(codes: torch.Tensor, size: int) -> torch.Tensor:
    """The numbers (…, size) that codes of any dtype stand for, before scaling: narrow ones as int8."""
    if codes.dtype == torch.uint8:
        cells = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (1 + GROUP))).unflatten(
            -1, (-1, 1 + GROUP)
        )
        nibbles = torch.stack([cells & 15, cells >> 4], dim=-1)
        multipliers, elements = nibbles[..., 0, :], nibbles[..., 1:, :].unflatten(-2, (2, -1)).flatten(-2)
        place = multipliers[..., None].int() * 16 + elements
        return level_table(codes.device).flatten()[place].flatten(-3)[..., :size]
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
