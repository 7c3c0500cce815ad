"""How the rows of a store are coded: what encode_rows writes and the scoring ops read.

A block of d numbers is kept as y ≈ scale · code. The dtype of the codes alone tells how they are packed:

    float32, float16   the numbers themselves, without scales
    int8               whole numbers from -127 to 127
    uint8  ("int4")    whole numbers that their group's multiplier and four bits of each tell, see :func:`pack_int4`
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

LEVELS = (2, 8, 13, 19, 24, 30, 36, 42, 48, 55, 62, 71, 80, 92, 108, 127)
"""Magnitudes of the 32 levels of int4. They lie where numbers of a normal distribution are lost least."""

LEVEL_SETS = tuple(sorted([*LEVELS, *(-level for level in LEVELS)])[first::2] for first in (0, 1))
"""The 16 levels that a code of int4 chooses from. The code before it, a, and the one before that, b, both of the same
group or else 0, say which of them it is: in a group with the largest multiplier, code c stands for
LEVEL_SETS[a % 2][c ^ b % 2], with others for ⌊(that · multiplier + 8) / 16⌋."""


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


def _int4_numbers(codes: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """What codes (…, n, 32) of groups with multipliers (…, n) stand for, as int8."""
    levels = torch.tensor(LEVEL_SETS, dtype=torch.int16, device=codes.device)
    before = torch.nn.functional.pad(codes & 1, (2, 0))
    chosen = levels.flatten()[before[..., 1:-1].int() * 16 + (codes ^ before[..., :-2])]
    return (chosen * multipliers[..., None] + 8 >> 4).to(torch.int8)


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
        multipliers, groups = nibbles[..., 0, :] + 1, nibbles[..., 1:, :].unflatten(-2, (2, -1)).flatten(-2)
        return _int4_numbers(groups, multipliers).flatten(-3)[..., :size]
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
