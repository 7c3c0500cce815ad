"""Choosing the implementation of an op.

Each op's package holds a literal table, ``{device type: (backend, …)}``, best first. A backend ``name`` is the
module ``_<name>.py`` of that package and defines a function with the op's name; it is imported on first use.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trackstar_kernels import _C

Table = Mapping[str, tuple[str, ...]]

_TABLES: dict[str, Table] = {}


def register(op: str, table: Table) -> Table:
    """Announce the backend table of ``op``, so that :func:`available_backends` can list it; returns it."""
    _TABLES[op] = table
    return table


def available_backends() -> dict[str, dict[str, tuple[str, ...]]]:
    """Backends of every op that run on every device this machine has, ``{op: {device: (backend, …)}}``, best first."""
    devices = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    return {
        op: {device: _available(names) for device, names in table.items() if device in devices}
        for op, table in _TABLES.items()
    }


@functools.cache
def lacks(backend: str) -> str | None:
    """What this machine lacks to run ``backend``, or None; decided once per process."""
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if backend == "cuda" and not _C.with_cuda:
        return "trackstar_kernels was built without nvcc"
    if backend in ("triton", "cuda"):
        amd = torch.version.hip is not None
        if not torch.cuda.is_available() or (amd and backend == "cuda"):
            return "there is no CUDA device"
        if not amd and torch.cuda.get_device_capability() < (8, 0):
            return "the CUDA device is older than compute capability 8.0"
    return None


def _available(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if lacks(name) is None)


def implementation(
    package: str, op: str, device: torch.device, backend: str | None, *, function: str | None = None
) -> Callable[..., Any]:
    """The function that runs ``op`` on ``device``.

    Args:
        package: the op's package, ``__name__`` of its ``__init__``.
        op: name of the op.
        device: where its tensors are.
        backend: a name from the op's table, or None for the first that is available.
        function: the function's name, where that is not the op's.

    Raises:
        ValueError: the op does not run on that device, has no such backend there, or this machine lacks what
            the backend needs.
    """
    names = _TABLES[op].get(device.type)
    if names is None:
        raise ValueError(f"{op} runs on devices {', '.join(sorted(_TABLES[op]))}; got {device.type}")
    if backend is None:
        backend = _available(names)[0]
    elif backend not in names:
        raise ValueError(
            f"backend of {op} on {device.type} must be one of {', '.join(names)}, got {backend!r}"
        )
    elif (missing := lacks(backend)) is not None:
        raise ValueError(
            f"backend {backend!r} of {op} is not available: {missing}; "
            f"available on {device.type}: {', '.join(_available(names))}"
        )
    return getattr(importlib.import_module(f"{package}._{backend}"), function or op)
