"""Saved optimizer states on disk: opened whole, read one tensor at a time.

Whatever the format, an opened state is ``{"state": {key: {field: value}}, "param_groups": [group, …]}``, as
``Optimizer.state_dict()`` makes it. Keys are the parameters' names, or their numbers; values are numbers,
tensors that are mapped into memory, or :class:`Stored` ones.
"""

import dataclasses
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

State = Mapping[str, Any]

QUANTIZED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes (from 0.49) nests the quantized fields of a parameter, so that FSDP leaves them alone."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A value that is still in its file: its shape, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], Any]


def value_of(field: Any) -> Any:
    """The value of a field, read now if it is still in its file."""
    return field.read() if isinstance(field, Stored) else field


def open_state(path: Path) -> State:
    """Open the optimizer state in a file, or in a folder that holds one under a name of ``IN_FOLDERS``.

    A distributed checkpoint is unpickled, as torch itself reads it: open none that you would not run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the folder holds several, or the file is not an optimizer state.
    """
    if path.is_dir():
        found = [name for name in IN_FOLDERS if (path / name).is_file()]
        if len(found) > 1:
            raise ValueError(
                f"optimizer state must be one file, {path} holds {' and '.join(found)}: name one"
            )
        path = path / found[0] if found else path
    if not path.is_file():
        raise FileNotFoundError(
            f"optimizer state must be a file, or a folder with {', '.join(IN_FOLDERS)}; found none at {path}"
        )
    return check_state(next(reader for ending, reader in FORMATS.items() if path.name.endswith(ending))(path))


def check_state(state: Any) -> State:
    """The state as described above, made from one with flat keys where it is such a one.

    Raises:
        ValueError: it is not an optimizer's.
    """
    if isinstance(state, Mapping) and any(str(key).startswith("state.") for key in state):
        state = _nest(state)
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise ValueError('state must be an optimizer\'s state_dict with "state" and "param_groups"')
    return state


def _nest(leaves: Mapping[str, Any]) -> State:
    """The state whose values have keys like "state.<parameter>.exp_avg_sq" and "param_groups.<group>.eps".

    Of groups, torch writes three forms: numbered, with lists of their parameters; one for every parameter, under its
    name; or, before 2.4, all in one value.
    """
    entries: dict[Any, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, leaf in leaves.items():
        part, _, rest = key.partition(".")
        owner, _, option = rest.rpartition(".")
        if part == "state" and owner:
            entries.setdefault(owner.removesuffix(f".{QUANTIZED}"), {})[option] = leaf
        elif key == "param_groups":
            groups |= {str(number): dict(group) for number, group in enumerate(value_of(leaf))}
        elif part == "param_groups" and option in ("params", "betas", "eps", "step"):
            groups.setdefault(owner, {})[option] = value_of(leaf)
    for owner, group in groups.items():
        group.setdefault("params", [owner])
    if any(isinstance(name, int) for group in groups.values() for name in group["params"]):
        entries = {int(key) if key.isdigit() else key: entry for key, entry in entries.items()}
    return {"state": entries, "param_groups": list(groups.values())}


def _open_torch(file: Path) -> State:
    """What ``torch.save`` made of a ``state_dict()``: Trainer, accelerate, FSDP's full state, any training loop."""
    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except PermissionError:
        raise
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        raise ValueError(
            f"optimizer state must be what torch.save makes of a state_dict(); {file} is damaged, another kind of "
            "file, or holds objects beside tensors and numbers"
        ) from error


def _open_safetensors(file: Path) -> State:
    return _join_safetensors([file])


def _open_safetensors_index(file: Path) -> State:
    try:
        shards = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'optimizer state: {file} must be an index of shards, with a "weight_map"'
        ) from error
    return _join_safetensors([file.parent / shard for shard in shards])


def _join_safetensors(files: list[Path]) -> State:
    """Tensors "<parameter>.exp_avg_sq"; step, betas and eps are JSON in a file's metadata, where it has them."""
    from safetensors import SafetensorError, safe_open

    leaves: dict[str, Stored] = {}
    options: dict[str, Any] = {}
    for file in files:
        try:
            shard = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"optimizer state: {file} is not a safetensors file, or is damaged") from error
        options |= {
            k: json.loads(v) for k, v in (shard.metadata() or {}).items() if k in ("step", "betas", "eps")
        }
        for key in shard.keys():  # noqa: SIM118 (not a dict)
            shape = tuple(shard.get_slice(key).get_shape())
            leaves[f"state.{key}"] = Stored(shape, partial(shard.get_tensor, key))
    entries = _nest(leaves)["state"]
    return {"state": entries, "param_groups": [{"params": list(entries), **options}]}


class _Reader(checkpoint.FileSystemReader):
    """torch's reader, which parses the folder's metadata once and not for every tensor."""

    _parsed: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._parsed is None:
            self._parsed = super().read_metadata(*args, **kwargs)
        return self._parsed


def _open_distributed(file: Path) -> State:
    """A folder of ``torch.distributed.checkpoint``, given its ".metadata"; read by this process alone."""
    reader = _Reader(file.parent)
    try:
        metadata = reader.read_metadata()
    except Exception as error:  # whatever unpickling meets
        raise ValueError(
            f"optimizer state: {file} is not a distributed checkpoint's, or is damaged"
        ) from error

    leaves: dict[str, Stored] = {}
    for key, item in metadata.state_dict_metadata.items():
        steps = [str(step) for step in (metadata.planner_data or {}).get(key, (key,))]
        start = next((i for i, s in enumerate(steps) if s.split(".")[0] in ("state", "param_groups")), None)
        if start is None:
            continue
        name = ".".join(steps[start:])
        if name in leaves:
            raise ValueError(
                f"optimizer state must be of one optimizer; {file.parent} holds several of {name!r}"
            )
        shape = tuple(item.size) if isinstance(item, TensorStorageMetadata) else ()
        leaves[name] = Stored(shape, partial(_read_distributed, reader, key, item))
    return _nest(leaves)


def _read_distributed(reader: _Reader, key: str, item: TensorStorageMetadata | BytesStorageMetadata) -> Any:
    loaded: dict[str, Any] = {key: None}
    if isinstance(item, TensorStorageMetadata):
        loaded[key] = torch.empty(item.size, dtype=item.properties.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            checkpoint.load(loaded, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise OSError(f"optimizer state: {key!r} of {reader.path} cannot be read: {cause}") from error
    return loaded[key]


FORMATS: dict[str, Callable[[Path], State]] = {
    ".metadata": _open_distributed,
    ".safetensors.index.json": _open_safetensors_index,
    ".safetensors": _open_safetensors,
    "": _open_torch,
}
"""How a file is opened, by the ending of its name; the first that fits."""

IN_FOLDERS = (
    "optimizer.pt",  # transformers' Trainer
    "optimizer.bin",  # accelerate, FSDP's full state
    "optimizer_0/.metadata",  # accelerate, FSDP's sharded state
    ".metadata",  # a distributed checkpoint itself
    "optimizer.safetensors",
    "optimizer.safetensors.index.json",
)
"""Under which names a checkpoint folder holds its optimizer state."""
