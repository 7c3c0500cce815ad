"""How fast a machine computes and reads: this one's, measured in a second, or a GPU's, from its data sheet."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

MEASURED_BYTES = 256 << 20
"""More than a cache holds."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a plan's times rest on.

    Attributes:
        name: of the machine.
        flops: operations a second of float32 matrix products.
        read: bytes a second at which rows in memory reach what scores them.
        disk: bytes a second from a file that is not in memory; None where that is not known.
        source: where the figures come from.
        memory: bytes of a GPU's memory; None for this machine, whose memory is the process's.
    """

    name: str
    flops: float
    read: float
    disk: float | None
    source: str
    memory: float | None = None

    def __str__(self) -> str:
        disk = "" if self.disk is None else f", {self.disk / 1e9:.3g} GB/s from disk"
        return (
            f"{self.name}: {self.flops / 1e9:,.0f} GFLOP/s in float32, reads {self.read / 1e9:.3g} GB/s{disk} "
            f"({self.source})"
        )


def _data_sheet(name: str, teraflops: float, memory: float, link: float, sheet: str) -> Rates:
    """Rates of a GPU with so many GB, which rows reach over a PCIe link of so many GB/s each way."""
    source = f"from data sheet, not measured: {sheet}"
    return Rates(name, teraflops * 1e12, link * 1e9, None, source, memory * 1e9)


GPUS = {
    "H200": _data_sheet("NVIDIA H200 SXM", 67, 141, 64, "NVIDIA H200 Tensor Core GPU datasheet"),
    "H100": _data_sheet("NVIDIA H100 SXM", 67, 80, 64, "NVIDIA H100 Tensor Core GPU datasheet"),
    "A100": _data_sheet(
        "NVIDIA A100 SXM 80GB", 19.5, 80, 32, "NVIDIA A100 Tensor Core GPU datasheet, 1758950-r4"
    ),
    "L40S": _data_sheet("NVIDIA L40S", 91.6, 48, 32, "NVIDIA L40S datasheet"),
    "L4": _data_sheet("NVIDIA L4", 30.3, 24, 32, "NVIDIA L4 Tensor Core GPU datasheet"),
}
"""Float32 without tensor cores, which is what torch computes in unless told otherwise; the link is half of what the
data sheet gives for both ways."""


def measured_rates(folder: Path) -> Rates:
    """Rates of this machine, with torch's threads.

    Args:
        folder: on the disk that is to be measured.

    Raises:
        OSError: the folder cannot be written to.
    """
    a, b, out = torch.randn(3, 1024, 1024)
    flops = 2 * 1024**3 / _best(lambda: torch.mm(a, b, out=out))
    rows = torch.ones(MEASURED_BYTES // 4096, 1024)
    read = rows.nbytes / _best(lambda: torch.mv(rows, a[0]))
    return Rates(
        "this machine", flops, read, _disk(folder, rows), f"measured, {torch.get_num_threads()} threads"
    )


def _best(run: Callable[[], object], seconds: float = 0.2) -> float:
    """Least time of several runs."""
    run()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _disk(folder: Path, content: torch.Tensor) -> float | None:
    """Bytes a second of a file that was put out of memory, None where the system cannot do that."""
    if not hasattr(os, "posix_fadvise"):
        return None
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(content.numpy().data)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer = bytearray(4 << 20)
        began = time.perf_counter()
        while file.readinto(buffer):
            pass
        return content.nbytes / (time.perf_counter() - began)
