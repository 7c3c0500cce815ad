"""Argument checks shared by the ops: each error names the argument, what was wanted and what came."""

from collections.abc import Sequence

import torch


def check_tensor(name: str, value: object) -> torch.Tensor:
    """``value`` if it is a tensor whose numbers lie in memory as they are.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it is sparse or nested, or stands for numbers that are nowhere: negated or zero when they are read.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise ValueError(f"{name} must be strided, got {'nested' if value.is_nested else value.layout}")
    # A compiler's tensors are never such, and it cannot ask.
    if not torch.compiler.is_compiling() and (value.is_neg() or value._is_zerotensor()):
        raise ValueError(f"{name} must hold its numbers in memory, not when they are read: pass its clone()")
    return value


def check_shape(name: str, tensor: torch.Tensor, *wanted: Sequence[int | str]) -> None:
    """Require one of the shapes ``wanted``; a string stands for any size and is the name shown for it.

    Raises:
        ValueError: the shape is none of them.
    """
    shape = tuple(tensor.shape)
    for option in wanted:
        if len(option) == len(shape) and all(
            isinstance(w, str) or w == s for w, s in zip(option, shape, strict=True)
        ):
            return
    shapes = " or ".join(f"({', '.join(map(str, option))}{',' * (len(option) == 1)})" for option in wanted)
    raise ValueError(f"{name} must have shape {shapes}, got {shape}")


def check_dtype(name: str, tensor: torch.Tensor, *wanted: torch.dtype) -> None:
    """Require one of the dtypes ``wanted``.

    Raises:
        TypeError: the dtype is none of them.
    """
    if tensor.dtype not in wanted:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
        raise TypeError(f"{name} must have dtype {names}; got {str(tensor.dtype).removeprefix('torch.')}")


def check_same_device(**tensors: torch.Tensor | None) -> torch.device:
    """The one device that all the tensors are on.

    Raises:
        ValueError: they are on different devices.
    """
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) != 1:
        places = ", ".join(f"{name} on {device}" for name, device in given.items())
        raise ValueError(f"tensors must be on one device, got {places}")
    return next(iter(given.values()))


def check_flag(name: str, value: object) -> bool:
    """``value`` if it is a bool.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def check_backend(backend: object) -> str | None:
    """``backend`` if it may be a backend's name.

    Raises:
        TypeError: it is neither a str nor None.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a str or None, got {type(backend).__name__}")
    return backend


def check_count(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` if it is an int in [low, high].

    Raises:
        TypeError: it is not an int.
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return value
