"""Random projection matrices that are a pure function of (seed, stream, row, col)."""

import torch

from trackstar_kernels._checks import check_backend, check_count
from trackstar_kernels._custom_ops import custom_op
from trackstar_kernels._dispatch import implementation, register

BACKENDS = register(
    "projection_matrix", {"cpu": ("numba", "reference"), "cuda": ("triton", "numba", "reference")}
)

KINDS = ("rademacher", "gaussian", "countsketch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def projection_matrix(
    rows: int,
    cols: int,
    *,
    seed: int,
    stream: int,
    kind: str = "rademacher",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> torch.Tensor:
    """Random matrix P (rows, cols) with E[PᵀP] = I: columns independent, entries of mean 0 and variance 1/rows.

    Entry (i, j) depends on (seed, stream, i, j) alone, and on rows if kind is "countsketch", through
    Philox4x32-10 and integer arithmetic, so it is bit-identical on every backend, machine and torch version. A
    wider matrix holds a narrower one as its first columns, and a taller one a lower one as its first rows (up
    to the factor 1/√rows; not "countsketch"). The format is frozen: see this folder's README.md.

    Args:
        rows: sketch size, at least 1.
        cols: size of the space that is projected, at least 1.
        seed: 0 ≤ seed < 2⁶⁴.
        stream: 0 ≤ stream < 2⁶⁴; matrices of different streams are independent.
        kind: "rademacher" (±1/√rows), "gaussian" (quantiles of 16 random bits; largest entry 4.2/√rows) or
            "countsketch" (each column one ±1 in a random row, zeros elsewhere).
        dtype: torch.float16, bfloat16, float32 or float64; entries are rounded to it once.
        device: where the result goes; the entries do not depend on it.
        backend: None, "triton" (device "cuda" only), "numba" or "reference".

    Works under torch.compile and with fake tensors, as the custom op ``trackstar::projection_matrix``.

    Returns:
        (rows, cols) tensor.

    Raises:
        TypeError: a size, seed or stream is not an int, or dtype is none of these.
        ValueError: a value is out of range, kind or backend is unknown, or there is no such device.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox); Charikar et
    al., "Finding frequent items in data streams", ICALP 2002 (CountSketch); TrackStar, arXiv 2410.17413, section
    3 (two-sided projection).
    """
    check_count("rows", rows, 1, 2**32 - 1)
    check_count("cols", cols, 1, 2**32 - 1)
    check_count("seed", seed, 0, 2**64 - 1)
    check_count("stream", stream, 0, 2**64 - 1)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise TypeError(f"dtype must be one of {names} of torch, got {dtype!r}")
    check_backend(backend)
    # A custom op's integers are signed.
    seed, stream = (word - 2**64 if word >= 2**63 else word for word in (seed, stream))
    return _projection_matrix(rows, cols, seed, stream, kind, dtype, _existing(device), backend)


def _existing(device: object) -> torch.device:
    """``device``, if this machine has it."""
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a torch.device or a str, got {type(device).__name__}")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must name a device of torch, got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one of this machine's, got {device!r}")
    return found


@custom_op("projection_matrix")
def _projection_matrix(
    rows: int,
    cols: int,
    seed: int,
    stream: int,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None,
) -> torch.Tensor:
    """:func:`projection_matrix`, with seed and stream as two's complement."""
    run = implementation(__name__, "projection_matrix", device, backend)
    return run(rows, cols, seed % 2**64, stream % 2**64, kind, dtype, device)


@torch.library.register_fake("trackstar::projection_matrix")
def _(
    rows: int,
    cols: int,
    seed: int,
    stream: int,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None,
) -> torch.Tensor:
    return torch.empty(rows, cols, dtype=dtype, device=device)
