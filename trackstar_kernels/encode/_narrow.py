"""The end of every encoding: norms, and codes in the dtype of a store."""

import functools
from collections.abc import Callable

import torch

from trackstar_kernels._codes import DTYPES, code_size, pack_signs, unpack
from trackstar_kernels.encode._trellis import pack_best_codes

PackBestCodes = Callable[[torch.Tensor], torch.Tensor]

CHUNK = 2**18  # numbers narrowed at once, so that the many passes over them stay in cache


def narrow(
    whitened: torch.Tensor, dtype: str, pack: PackBestCodes = pack_best_codes
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes of rows (N, L, d) in ``dtype``, those of int4 as ``pack`` finds them, and their scales if it has any."""
    code_dtype = DTYPES[dtype]
    if code_dtype.is_floating_point:
        return whitened.to(code_dtype), None
    N, L, d = whitened.shape
    codes = whitened.new_empty(N, L, code_size(d, code_dtype), dtype=code_dtype)
    scales = whitened.new_empty(N, L, dtype=torch.float32)
    quantizers: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
        "int8": _int8,
        "int4": functools.partial(_int4, pack=pack),
        "sign": _signs,
    }
    step = max(1, CHUNK // max(1, L * d))
    for start in range(0, N, step):
        part = slice(start, start + step)
        codes[part], scales[part] = quantizers[dtype](whitened[part])
    return codes, scales


def narrow_with_norms(
    whitened: torch.Tensor, dtype: str, pack: PackBestCodes = pack_best_codes
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What :func:`narrow` gives, and squared norms (N, L) before that: summed in float64, kept in float32."""
    return *narrow(whitened, dtype, pack), whitened.square().sum(dim=2, dtype=torch.float64).float()


def _signs(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs, and the mean magnitude."""
    return pack_signs(rows), _or_nan(rows, rows.abs().mean(dim=2, dtype=torch.float64))


def _int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers of which the largest is 127, and the scale that leaves the least behind."""
    unit, largest = _unit(rows)
    numbers = (unit * 127).round_()
    return numbers.nan_to_num(0).to(torch.int8), _scales(rows, unit, numbers, largest)


def _int4(rows: torch.Tensor, pack: PackBestCodes) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and multipliers that leave the least behind, and scales."""
    unit, largest = _unit(rows)
    packed = torch.where((largest > 0) & largest.isfinite(), pack(unit.nan_to_num(0)), 0)
    return packed, _scales(rows, unit, unpack(packed, rows.shape[2]).to(rows.dtype), largest)


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
