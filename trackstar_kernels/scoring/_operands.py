"""Float32 matrices as csrc/cuda takes them to tensor cores: split in planes of narrow numbers, cut in tiles.

A number is the sum of its planes, and each plane's products with stored numbers are exact. Two planes of float16
or tf32 keep 23 bits of a number, three of bfloat16 all 24. Float16 reaches down to 2⁻²⁴ only, so its planes are of
numbers brought to below 2¹⁵: what is smaller than the largest by more than 2³⁹ is lost.
"""

import torch

LINE = 128  # bytes of one vector in one step and plane
UNIT = 16  # bytes that are copied and loaded as one

# Rows of bytes are widened to float16.
PLANES = {
    torch.float32: (torch.float32, 2),
    torch.float16: (torch.float16, 2),
    torch.bfloat16: (torch.bfloat16, 3),
    torch.int8: (torch.float16, 2),
}


def operand(matrix: torch.Tensor, dtype: torch.dtype, columns: int) -> torch.Tensor:
    """The matrix (M, L, d) float32 as an operand for rows of ``dtype``, ``columns`` of its vectors at a time.

    Returns (⌈M / columns⌉, L, ⌈d / depth⌉, planes, columns, 8 units, numbers of a unit), padded with zeros, where a
    step of ``depth`` numbers fills a line and unit u of vector m stands at place u XOR (m mod 8). Bytes are
    multiplied as they come out of a word of four, first and second before third and fourth, eight words at a
    time; so are vectors for them.
    """
    M, L, d = matrix.shape
    kind, count = PLANES[dtype]
    depth = LINE // kind.itemsize
    padded = torch.nn.functional.pad(matrix, (0, -d % depth, 0, 0, 0, -M % columns))
    if dtype == torch.int8:
        # (half of 32 numbers, word, pair of the word, number of the pair) -> (pair, half, word, number)
        padded = padded.unflatten(2, (-1, 2, 4, 2, 2)).permute(0, 1, 2, 5, 3, 4, 6).flatten(2)
    planes = torch.stack(split(padded, kind, count))
    tiles = planes.view(count, -1, columns, L, padded.shape[2] // depth, LINE // UNIT, UNIT // kind.itemsize)
    tiles = tiles.permute(1, 3, 4, 0, 2, 5, 6)
    vector = torch.arange(columns, device=matrix.device)[:, None]
    place = torch.arange(LINE // UNIT, device=matrix.device) ^ vector % 8
    return tiles[:, :, :, :, vector, place].contiguous()


def split(x: torch.Tensor, kind: torch.dtype, count: int) -> list[torch.Tensor]:
    """``count`` tensors of ``kind``, tf32 for float32, of which each is what the ones before it leave of x."""
    planes = []
    for _ in range(count):
        planes.append(_tf32(x) if kind == torch.float32 else x.to(kind))
        x = x - planes[-1].float()
    return planes


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of 11 significant bits, halves away from zero, as float32."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def exponents(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Powers of two (M, L) float32 that bring the numbers of each vector of (M, L, d) to below 2¹⁵, if that is needed.

    Ones if rows of ``dtype`` are not multiplied in float16; the same for a vector of zeros.
    """
    largest = matrix.abs().amax(2)
    if PLANES[dtype][0] != torch.float16:
        return torch.ones_like(largest)
    _, exponent = torch.frexp(largest)
    return torch.where(
        largest == 0, 1, torch.ldexp(torch.ones_like(largest), (15 - exponent).clamp(-126, 126))
    )
