"""The end of every encoding: norms, and codes in the dtype of a store."""

import torch

from trackstar_kernels._codes import (
    DTYPES,
    GROUP,
    code_size,
    pack_int4,
    pack_signs,
    unpack,
)
from trackstar_kernels.encode._trellis import best_codes

CHUNK = 2**18  # numbers narrowed at once, so that the many passes over them stay in cache


def narrow(whitened: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes of rows (N, L, d) in ``dtype``, and their scales if it has any."""
    code_dtype = DTYPES[dtype]
    if code_dtype.is_floating_point:
        return whitened.to(code_dtype), None
    N, L, d = whitened.shape
    codes = whitened.new_empty(N, L, code_size(d, code_dtype), dtype=code_dtype)
    scales = whitened.new_empty(N, L, dtype=torch.float32)
    quantize = {"int8": _int8, "int4": _int4, "sign": _signs}[dtype]
    step = max(1, CHUNK // max(1, L * d))
    for start in range(0, N, step):
        part = slice(start, start + step)
        codes[part], scales[part] = quantize(whitened[part])
    return codes, scales


def narrow_with_norms(
    whitened: torch.Tensor, dtype: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Codes, scales, and the squared norms (N, L) before narrowing: summed in float64, kept in float32."""
    return *narrow(whitened, dtype), whitened.square().sum(dim=2, dtype=torch.float64).float()


def _signs(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs, and the mean magnitude."""
    return pack_signs(rows), _or_nan(rows, rows.abs().mean(dim=2, dtype=torch.float64))


def _int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers of which the largest is 127, and the scale that leaves the least behind."""
    unit, largest = _unit(rows)
    numbers = (unit * 127).round_()
    return numbers.nan_to_num(0).to(torch.int8), _scales(rows, unit, numbers, largest)


def _int4(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and multipliers that leave the least behind, and scales."""
    d = rows.shape[2]
    unit, largest = _unit(rows)
    groups = torch.nn.functional.pad(unit.nan_to_num(0), (0, -d % GROUP)).unflatten(2, (-1, GROUP))
    used = torch.arange(groups.shape[2] * GROUP, device=rows.device).view(-1, GROUP) < d
    codes, multipliers = best_codes(groups.flatten(0, 2), used.expand(groups.shape).flatten(0, 2))
    codes = torch.where(unit.isfinite() & (largest > 0), codes.reshape(*rows.shape[:2], -1)[:, :, :d], 0)
    packed = pack_int4(codes, multipliers.reshape(groups.shape[:3]))
    return packed, _scales(rows, unit, unpack(packed, d).to(rows.dtype), largest)


def _unit(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks divided by their largest magnitudes, so that products neither overflow nor vanish; and these."""
    largest = rows.abs().amax(dim=2, keepdim=True)
    return torch.where(largest == 0, 0, rows / largest), largest


def _scales(
    rows: torch.Tensor, unit: torch.Tensor, numbers: torch.Tensor, largest: torch.Tensor
) -> torch.Tensor:
    """The best scale of a block y for numbers c, ⟨y, c⟩ / ‖c‖², which makes scale · c the projection of y on c."""
    inner = (unit * numbers).sum(dim=2, keepdim=True, dtype=torch.float64)
    scale = inner / numbers.square().sum(dim=2, keepdim=True, dtype=torch.float64)
    return _or_nan(rows, torch.where(largest == 0, 0, scale * largest)[:, :, 0])


def _or_nan(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The scales as float32, NaN for blocks that are not finite."""
    return torch.where(rows.isfinite().all(dim=2), scales, torch.nan).float()
