"""The end of every encoding: norms, and codes in the dtype of a store."""

import torch

from trackstar_kernels._codes import DTYPES, code_size, pack_int4, pack_signs

LARGEST = {"int8": 127, "int4": 7}
# Where values are clipped, as parts of a block's largest. Eight bits have room for it; with four, clipping the
# few largest makes steps finer for all others, and what is best depends on the block's tails.
CLIPS = {"int8": (1.0,), "int4": (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)}
CHUNK = 2**18  # numbers narrowed at once, so that the many passes over them stay in cache


def narrow(whitened: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes of rows (N, L, d) in ``dtype``, and their scales if it has any."""
    code_dtype = DTYPES[dtype]
    if code_dtype.is_floating_point:
        return whitened.to(code_dtype), None
    N, L, d = whitened.shape
    codes = whitened.new_empty(N, L, code_size(d, code_dtype), dtype=code_dtype)
    scales = whitened.new_empty(N, L, dtype=torch.float32)
    quantize = _signs if dtype == "sign" else _whole_numbers
    step = max(1, CHUNK // max(1, L * d))
    for start in range(0, N, step):
        part = slice(start, start + step)
        codes[part], scales[part] = quantize(whitened[part], dtype)
    return codes, scales


def narrow_with_norms(
    whitened: torch.Tensor, dtype: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Codes, scales, and the squared norms (N, L) before narrowing: summed in float64, kept in float32."""
    return *narrow(whitened, dtype), whitened.square().sum(dim=2, dtype=torch.float64).float()


def _signs(rows: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs, and the mean magnitude."""
    return pack_signs(rows), _or_nan(rows, rows.abs().mean(dim=2, dtype=torch.float64))


def _whole_numbers(rows: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole numbers and scale, of one for each clip, that leave the least behind.

    With codes c, the best scale of a block y is ⟨y, c⟩ / ‖c‖², which makes scale · c the projection of y on c. It
    keeps ⟨y, c⟩² / ‖c‖² of ‖y‖².
    """
    top = LARGEST[dtype]
    largest = rows.abs().amax(dim=2, keepdim=True)
    unit = torch.where(largest == 0, 0, rows / largest)  # whose products neither overflow nor vanish
    tries = []
    for clip in CLIPS[dtype]:
        codes = (unit * (top / clip)).round_().clamp_(-top, top)
        inner = (unit * codes).sum(dim=2, keepdim=True, dtype=torch.float64)
        scale = inner / codes.square().sum(dim=2, keepdim=True, dtype=torch.float64)
        tries.append((inner * scale, codes, scale))
    best, codes, scale = tries[0]
    for kept, other_codes, other_scale in tries[1:]:
        better = kept > best
        best = torch.where(better, kept, best)
        codes = torch.where(better, other_codes, codes)
        scale = torch.where(better, other_scale, scale)
    scale = torch.where(largest == 0, 0, scale * largest)[:, :, 0]
    codes = codes.nan_to_num(0).to(torch.int8)
    return codes if dtype == "int8" else pack_int4(codes), _or_nan(rows, scale)


def _or_nan(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The scales as float32, NaN for blocks that are not finite."""
    return torch.where(rows.isfinite().all(dim=2), scales, torch.nan).float()
