"""Gradient indexes of bergson: read as rows, and made into stores.

An index is a folder with ``info.json`` and ``gradients.bin``, num_grads rows of numbers in C order, each module's
beside the one before:

    {"num_grads": N, "grad_sizes": {module: numbers}, "base_dtype": "float32" | "float16" | "bfloat16" | …,
     "attribute_tokens": false}

Older ones have, in place of ``base_dtype``, a numpy record type with a field for each module, which is the same bytes.
Where ``attribute_tokens`` is true a row is a token's, and ``offsets.npy`` (documents + 1,) says which rows are of which
document.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from trackstar.curvature import DAMPING, SecondMoment, damped_curvature
from trackstar.errors import StoreError
from trackstar.gradients.examples import Encoded
from trackstar.progress import console, track
from trackstar.storage import fingerprint
from trackstar.storage.build import check_dtypes, chunks, commit_rows
from trackstar.storage.durable import require_disk
from trackstar.storage.layout import Layout
from trackstar.storage.manifest import Manifest
from trackstar.storage.store import Store, open_store
from trackstar.storage.writer import Writer, making
from trackstar.storage.writing import write_curvature

DTYPES = {"float16": "<f2", "float32": "<f4", "float64": "<f8", "bfloat16": "<u2"}
"""Dtypes of numbers, and what numpy reads them as; it knows no bfloat16."""

LARGEST_BLOCK = 8192
"""Numbers of a module that R can be taken of: R has their square."""


class BergsonRows:
    """Rows of a bergson index; :func:`rows_from_bergson` makes one. The file is mapped, and read where rows are.

    Attributes:
        path: the index's folder.
        modules: {name: numbers} in the order in which they lie in a row.
    """

    def __init__(
        self, path: Path, modules: dict[str, int], numbers: np.ndarray, offsets: np.ndarray | None
    ) -> None:
        self.path = path
        self.modules = modules
        self._numbers = numbers
        self._offsets = offsets

    def __len__(self) -> int:
        """Documents."""
        return len(self._numbers) if self._offsets is None else len(self._offsets) - 1

    def __repr__(self) -> str:
        blocks, size = self.row_shape
        return f"BergsonRows({str(self.path)!r}, {len(self)} rows of {blocks}×{size})"

    @property
    def row_shape(self) -> tuple[int, int]:
        """(L, d): a block for each module, as long as the largest one; smaller ones end with zeros."""
        return len(self.modules), max(self.modules.values())

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The documents start ≤ i < stop, (n, L, d) float32; sums over tokens, where the index has these apart.

        Raises:
            IndexError: the range is not within the index.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows must lie within 0 to {len(self)}, got {start} to {stop}")
        if self._offsets is None:
            flat = _floats(self._numbers[start:stop])
        else:
            flat = torch.zeros(stop - start, self._numbers.shape[1])
            for i, (first, end) in enumerate(
                zip(self._offsets[start:stop], self._offsets[start + 1 : stop + 1], strict=True)
            ):
                flat[i] = _floats(self._numbers[first:end]).sum(0)
        found = torch.zeros(len(flat), *self.row_shape)
        for b, part in enumerate(flat.split(list(self.modules.values()), dim=1)):
            found[:, b, : part.shape[1]] = part
        return found

    def fingerprint(self) -> str:
        """A hash of all that is read."""
        digest = xxhash.xxh3_128(json.dumps([self.modules, self._numbers.dtype.str]).encode())
        digest.update(b"" if self._offsets is None else self._offsets.tobytes())
        digest.update(self._numbers.data)
        return digest.hexdigest()


def rows_from_bergson(path: str | os.PathLike[str]) -> BergsonRows:
    """Open a bergson index as a source of rows.

    Args:
        path: the folder with ``info.json`` and ``gradients.bin``.

    Raises:
        FileNotFoundError: there is no index.
        StoreError: ``info.json`` says what cannot be, or ``gradients.bin`` is not as long as it says.
    """
    path = Path(path)
    if not (path / "info.json").is_file():
        raise FileNotFoundError(f"there is no bergson index at {path} (no info.json)")
    try:
        info = json.loads((path / "info.json").read_bytes())
        modules = {str(name): _count(size, 1) for name, size in info["grad_sizes"].items()}
        count = _count(info["num_grads"])
        dtype = np.dtype(DTYPES[_dtype_of(info)])
        by_token = info.get("attribute_tokens", False)
        if not modules:
            raise ValueError("grad_sizes names no module")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise StoreError(f"{path / 'info.json'} describes no bergson index: {reason}") from None
    width = sum(modules.values())
    wanted, file = count * width * dtype.itemsize, path / "gradients.bin"
    found = file.stat().st_size if file.is_file() else 0
    if found != wanted or wanted == 0:
        raise StoreError(
            f"{file} must hold {count} rows of {width} numbers, {wanted} bytes, as info.json says; it has {found}"
        )
    numbers = np.memmap(file, dtype, mode="r", shape=(count, width))
    return BergsonRows(path, modules, numbers, _offsets(path, count) if by_token else None)


def import_bergson(
    source: str | os.PathLike[str] | BergsonRows,
    out: str | os.PathLike[str],
    *,
    examples: Iterable[Mapping[str, Any]] | None = None,
    dtype: str = "float16",
    wide: str | None = None,
) -> Store:
    """Make a store of a bergson index's rows, whitened by their own R_train, or finish what an earlier call began.

    The store is scored with rows of queries (:func:`trackstar.scoring.attribution.score_rows`), such as those of
    another index with the same modules and projections. It knows no model, so that :func:`attribute` refuses it.

    Args:
        source: the index.
        out: folder of the store; made if missing.
        examples: the documents, in the order of the index: {"id": …, "text": …, "metadata": …}, each field optional.
        dtype: "float32", "float16", "int8", "int4" or "sign".
        wide: "float16" or "float32" keeps a wider copy of the rows beside int8, int4 or sign codes.

    Raises:
        ValueError: an argument is not usable, or a module is zero in every row.
        FileNotFoundError: there is no index.
        StoreError: the index is damaged, or ``out`` holds something else, or another process is writing to it.
        OSError: the disk is full or cannot be written; what was committed stays.
        FloatingPointError: a row is NaN or Inf.
    """
    check_dtypes(dtype, wide)
    rows = source if isinstance(source, BergsonRows) else rows_from_bergson(source)
    blocks, size = rows.row_shape
    if size > LARGEST_BLOCK:
        largest = max(rows.modules, key=lambda name: rows.modules[name])
        raise ValueError(
            f"modules must have at most {LARGEST_BLOCK} numbers, got {size} in {largest!r}: project the gradients"
        )
    documents = _documents(examples, len(rows))
    layout = Layout(dtype, wide, blocks, size)
    identity = {
        "spec": {"bergson": rows.modules},
        "dtype": dtype,
        "wide": wide,
        "narrowed": None,
        "model": {"class": "bergson", "parameters": 0, "fingerprint": rows.fingerprint()},
        "tokenizer": None,
        "correction": None,
        "curvature": {"sample": len(rows), "damping": DAMPING},
        "shard_rows": layout.shard_rows,
    }
    begun = Manifest(identity, (blocks, size), (fingerprint.of_examples(documents),), len(rows))
    with making(Path(out), begun) as writer:
        if writer.manifest.committed < len(rows):
            left = len(rows) - writer.manifest.committed
            require_disk(Path(out), left * layout.row_bytes, "the import")
            _import(writer, rows, documents, layout.shard_rows)
    return open_store(out)


def _import(writer: Writer, rows: BergsonRows, documents: list[Encoded], shard_rows: int) -> None:
    if writer.manifest.curvature is None:
        moment = SecondMoment(*rows.row_shape)
        with track("collecting R_train", len(rows)) as advance:
            for start, stop in chunks(len(rows), shard_rows):
                moment.add(_finite(rows, start, stop))
                advance(stop - start)
        found = damped_curvature(moment.mean, rotated=writer.manifest.layout.narrow)
        if (doubts := moment.doubts()) is not None:
            console().print(f"warning: {doubts}", soft_wrap=True)
        writer.commit(replace(writer.manifest, curvature=write_curvature(writer.path, found)))

    def rows_of_shard(number: int, start: int, stop: int, advance: Any) -> torch.Tensor:
        advance(stop - start)
        return _finite(rows, start, stop)

    commit_rows(writer, documents, 0, shard_rows, rows_of_shard)


def _finite(rows: BergsonRows, start: int, stop: int) -> torch.Tensor:
    found = rows.rows(start, stop)
    fine = found.isfinite().all(2).all(1)
    if not fine.all():
        raise FloatingPointError(f"row {start + int((~fine).nonzero()[0])} of {rows.path} holds NaN or Inf")
    return found


def _documents(examples: Iterable[Mapping[str, Any]] | None, count: int) -> list[Encoded]:
    given: list[Mapping[str, Any]] = [{}] * count if examples is None else list(examples)
    if len(given) != count:
        raise ValueError(f"examples must be the index's {count} documents, got {len(given)}")
    nothing = np.zeros(0, np.int32)
    return [
        Encoded(
            str(document.get("id", i)),
            str(document.get("text", "")),
            nothing,
            nothing,
            json.dumps(document["metadata"], ensure_ascii=False) if "metadata" in document else "",
        )
        for i, document in enumerate(given)
    ]


def _floats(numbers: np.ndarray) -> torch.Tensor:
    """Numbers of an index, float32."""
    if numbers.dtype == np.dtype(DTYPES["bfloat16"]):
        return torch.from_numpy((numbers.astype(np.uint32) << 16).view(np.float32))
    return torch.from_numpy(numbers.astype(np.float32))


def _dtype_of(info: dict[str, Any]) -> str:
    """The name of the numbers' dtype."""
    if "base_dtype" in info:
        return str(info["base_dtype"])
    base = np.dtype(_format_of(info["dtype"]["formats"][0])).base
    # ml_dtypes' bfloat16 is two bytes without a meaning where ml_dtypes is not loaded.
    return "bfloat16" if base.kind == "V" and base.itemsize == 2 else base.name


def _format_of(text: str) -> str:
    return text.replace("bfloat16", "V2")


def _offsets(path: Path, rows: int) -> np.ndarray:
    """Where each document's rows begin, and where the last one's end."""
    try:
        offsets = np.load(path / "offsets.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{path / 'offsets.npy'} cannot be read: {error}") from None
    fits = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 1
    if not (fits and offsets[0] == 0 and offsets[-1] == rows and (np.diff(offsets) >= 0).all()):
        raise StoreError(f"{path / 'offsets.npy'} does not divide the {rows} rows of the index")
    return offsets


def _count(value: Any, minimum: int = 0) -> int:
    if type(value) is not int or value < minimum:
        raise ValueError(f"{value!r} is not a number of at least {minimum}")
    return value
