"""One shard: the rows of consecutive examples and the examples themselves, in a sealed folder.

Written once, whole or not at all; read array by array, mapped. What each array holds is in ``layout.py`` and in
docs/format.md.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmap_ninja import numpy as np_ninja

from trackstar.gradients.examples import Encoded
from trackstar.storage.durable import new_folder
from trackstar.storage.layout import OFFSETS, Layout
from trackstar.storage.manifest import ShardRecord
from trackstar.storage.sealed import Comparison, SealedFolder, seal
from trackstar_kernels import decode_rows, encode_rows

EXAMPLE_ARRAYS = ("offsets", "tokens", "strings")


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """Rows as a shard keeps them.

    Attributes:
        codes: (n, L, codes of a block), of the layout's dtype.
        scales: (n, L) float32, None for float32 and float16.
        squared_norms: ‖y‖² (n, L) float32, before narrowing.
        wide: (n, L, d) of the layout's wider dtype, or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    squared_norms: torch.Tensor
    wide: torch.Tensor | None

    @staticmethod
    def encode(rows: torch.Tensor, whitener: torch.Tensor | None, layout: Layout) -> "StoredRows":
        """Rows (n, L, d) float32 multiplied by ``whitener`` (L, d, d), if there is one, and narrowed."""
        if layout.wide is None:
            codes, scales, squared_norms = encode_rows(rows, whitener, layout.dtype)
            return StoredRows(codes, scales, squared_norms, None)
        rows, _, squared_norms = encode_rows(rows, whitener, "float32")
        codes, scales, _ = encode_rows(rows, None, layout.dtype)
        return StoredRows(codes, scales, squared_norms, encode_rows(rows, None, layout.wide)[0])


class Shard:
    """Rows start ≤ i < stop of a store, mapped where they are read, let go with this object.

    The bytes of an array are compared with their checksum before the first use. Every tensor is mapped privately:
    torch takes only memory that may be written to, and nothing here ever writes.
    """

    def __init__(
        self, root: Path, record: ShardRecord, layout: Layout, deleted: torch.Tensor, checked: memoryview
    ) -> None:
        """A shard; :attr:`Store.shards` makes them.

        Args:
            root: the store's folder.
            record: the shard's rows and seal.
            layout: of the store.
            deleted: positions in the shard, ascending, of the rows that were deleted.
            checked: one byte, whose bits say which arrays have been compared with their checksums.
        """
        self.start = record.start
        self.stop = record.stop
        self.layout = layout
        self.deleted = deleted
        self.folder = SealedFolder(root, record.path, record.seal)
        self._checked = checked
        self._arrays: dict[str, np.memmap] = {}
        self._comparisons: dict[str, Comparison] = {}

    def __len__(self) -> int:
        """Rows, the deleted ones included."""
        return self.stop - self.start

    @functools.cached_property
    def codes(self) -> torch.Tensor:
        """(n, L, codes of a block): what the scoring ops take as rows. Blocks of a row are dense, rows padded."""
        self.check("rows")
        return self.unchecked_rows("rows")

    @functools.cached_property
    def scales(self) -> torch.Tensor | None:
        """(n, L) float32: y ≈ scale · code; None for float32 and float16."""
        return torch.from_numpy(self.array("scales")) if self.layout.narrow else None

    @functools.cached_property
    def squared_norms(self) -> torch.Tensor:
        """‖y‖² (n, L) float32, before narrowing."""
        return torch.from_numpy(self.array("squared_norms"))

    @functools.cached_property
    def wide(self) -> torch.Tensor | None:
        """(n, L, d) the wider copy of the rows, None where there is none. Blocks of a row are dense, rows padded."""
        if self.layout.wide is None:
            return None
        self.check("wide")
        return self.unchecked_rows("wide")

    def open_rows(self, *, wide: bool) -> None:
        """Open what a scan of the codes or of the wider rows reads, those as :meth:`unchecked_rows`.

        Raises:
            StoreError: an array is missing or of another size, or one of those beside the rows is damaged.
        """
        self.unchecked_rows("wide" if wide else "rows")
        self.scales, self.squared_norms  # noqa: B018

    @property
    def live(self) -> torch.Tensor:
        """Positions in the shard, ascending, of the rows that are not deleted."""
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[self.deleted] = False
        return kept.nonzero()[:, 0]

    def floats(self, start: int, stop: int) -> torch.Tensor:
        """The store's rows start ≤ i < stop, (n, L, d) float32, from the widest form kept; zeros for deleted ones."""
        here = slice(start - self.start, stop - self.start)
        if self.wide is not None:
            wide, scales = self.wide[here], None
        else:
            wide, scales = self.codes[here], None if self.scales is None else self.scales[here]
        rows = decode_rows(wide, scales, self.layout.size)
        deleted = self.deleted[(self.deleted >= here.start) & (self.deleted < here.stop)] - here.start
        return rows.index_fill(0, deleted, 0)

    def tokens(self, index: int) -> np.ndarray:
        """The token ids (T,) int32 of the store's example ``index``."""
        (begin, *_), (end, *_) = self._offsets(index)
        return np.array(self._cut("tokens", begin, end))

    def id(self, index: int) -> str:
        """The id of the store's example ``index``."""
        (_, begin, end, _), _ = self._offsets(index)
        return self._string(begin, end)

    def text(self, index: int) -> str:
        """The text of the store's example ``index``."""
        (_, _, begin, end), _ = self._offsets(index)
        return self._string(begin, end)

    def metadata(self, index: int) -> dict[str, Any]:
        """The metadata that the store's example ``index`` came with, empty if none."""
        (*_, begin), (_, end, *_) = self._offsets(index)
        try:
            found = json.loads(self._string(begin, end) or "{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self.folder.error(f"{self.folder.name}/strings holds metadata that is not a JSON object")
        return found

    def example(self, index: int) -> dict[str, Any]:
        """The store's example ``index`` as it was given, apart from labels: those are not kept."""
        fields = {"id": self.id(index), "text": self.text(index), "input_ids": self.tokens(index)}
        (*_, begin), (_, end, *_) = self._offsets(index)
        return fields | ({"metadata": self.metadata(index)} if begin < end else {})

    def array(self, name: str) -> np.memmap:
        """An array as it lies on disk, mapped, once its bytes have been compared with their checksum.

        Raises:
            StoreError: it is missing or damaged.
        """
        self.check(name)
        return self.mapped(name)

    def mapped(self, name: str) -> np.memmap:
        """An array as it lies on disk, mapped; its bytes are not compared with their checksum.

        Raises:
            StoreError: it is missing or of another size.
        """
        if name not in self._arrays:
            self._arrays[name] = self.folder.array(name, *self.layout.array(name, len(self)), mode="c")
        return self._arrays[name]

    def unchecked_rows(self, name: str) -> torch.Tensor:
        """:attr:`codes` or :attr:`wide`, "rows" or "wide", to be compared with their checksum by :meth:`compare`.

        Raises:
            StoreError: the array is missing or of another size.
        """
        if not self._is_checked(name) and name not in self._comparisons:
            self._comparisons[name] = self.folder.comparison(name)
        blocks, codes = self.layout.code_shape(name)
        return torch.from_numpy(self.mapped(name))[:, : blocks * codes].unflatten(1, (blocks, codes))

    def compare(self, name: str, start: int, stop: int) -> None:
        """Compare rows start ≤ i < stop of :meth:`unchecked_rows` as far as they were not compared before.

        For whoever reads an array from its start to its end, so that each byte comes into the cache once. What is
        read is not to be made use of before :meth:`end_comparisons`.
        """
        if name in self._comparisons:
            array = self.mapped(name)
            content = array[start:stop].reshape(-1).view(np.uint8)
            self._comparisons[name].add(start * array.strides[0], content)

    def end_comparisons(self) -> None:
        """Compare what is left of all :meth:`unchecked_rows`.

        Raises:
            StoreError: they are damaged.
        """
        while self._comparisons:
            name, comparison = self._comparisons.popitem()
            comparison.end()
            self._checked[0] |= self._bit(name)

    def check(self, name: str) -> None:
        """Compare an array's bytes with their checksum, unless that was done before.

        Raises:
            StoreError: they differ.
        """
        if not self._is_checked(name):
            self.folder.require(f"{name}/")
            self._checked[0] |= self._bit(name)

    def _is_checked(self, name: str) -> bool:
        return self._checked[0] & self._bit(name) != 0

    def _bit(self, name: str) -> int:
        return 1 << self.layout.arrays.index(name)

    def _offsets(self, index: int) -> list[list[int]]:
        position = index - self.start
        return self.array("offsets")[position : position + 2].tolist()

    def _string(self, begin: int, end: int) -> str:
        raw = self._cut("strings", begin, end).tobytes()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.folder.error(f"{self.folder.name}/strings is not UTF-8") from None

    def _cut(self, name: str, begin: int, end: int) -> np.ndarray:
        array = self.array(name)
        if not 0 <= begin <= end <= len(array):
            raise self.folder.error(f"{self.folder.name}/offsets points outside of {name}")
        return array[begin:end]


def write_shard(
    root: Path, layout: Layout, start: int, rows: StoredRows, examples: "Sequence[Encoded] | Shard"
) -> ShardRecord:
    """Write the shard whose first row is number ``start``; a manifest has yet to name it.

    Args:
        root: the store's folder.
        layout: of the store.
        start: number of the first row.
        rows: what to keep.
        examples: the rows' examples, or the shard of another store that holds them.

    Raises:
        OSError: the disk is full or cannot be written.
        StoreError: the other store's shard is damaged.
    """
    count = len(rows.codes)
    path = ShardRecord.path_of(start, start + count)
    own = 0 if isinstance(examples, Shard) else example_bytes(examples)
    with new_folder(root / path, count * layout.row_bytes + own) as folder:
        for name in layout.row_arrays:
            np_ninja.from_ndarray(folder / name, _row_array(rows, name, layout))
        if isinstance(examples, Shard):
            for name in EXAMPLE_ARRAYS:
                examples.check(name)
                examples.folder.link(folder, f"{name}/")
        else:
            for name, array in zip(EXAMPLE_ARRAYS, _example_arrays(examples), strict=True):
                np_ninja.from_ndarray(folder / name, array)
        return ShardRecord(start, start + count, seal(folder))


def example_bytes(examples: Sequence[Encoded]) -> int:
    """Bytes of the arrays that hold these examples."""
    strings = sum(len(text.encode()) for example in examples for text in _strings(example))
    tokens = sum(len(example) for example in examples)
    return 8 * len(OFFSETS) * (len(examples) + 1) + 4 * (tokens + 1) + strings + 1


def _row_array(rows: StoredRows, name: str, layout: Layout) -> np.ndarray:
    """Codes, padded with zeros to the layout's stride, or what else there is of each row."""
    tensor = {
        "rows": rows.codes,
        "scales": rows.scales,
        "squared_norms": rows.squared_norms,
        "wide": rows.wide,
    }[name]
    if tensor is None:
        raise ValueError(f"rows must have {name} to be kept as {layout.dtype} with wide={layout.wide!r}")
    found = tensor.numpy().reshape(len(tensor), -1)
    dtype, (count, width) = layout.array(name, len(tensor))
    array = np.zeros((count or 0, width or 0), dtype)
    array[:, : found.shape[1]] = found
    return array


def _example_arrays(examples: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``offsets``, ``tokens`` and ``strings``; the last two end with a 0, as a map cannot be empty."""
    offsets = np.zeros((len(examples) + 1, len(OFFSETS)), np.int64)
    strings = bytearray()
    for i, example in enumerate(examples):
        for column, text in enumerate(_strings(example), start=1):
            offsets[i, column] = len(strings)
            strings += text.encode()
        offsets[i + 1, 0] = offsets[i, 0] + len(example)
    offsets[-1, 1:] = len(strings)
    tokens = np.concatenate([*(example.tokens for example in examples), np.zeros(1, np.int32)])
    return offsets, tokens, np.frombuffer(bytes(strings) + b"\0", np.uint8)


def _strings(example: Encoded) -> tuple[str, str, str]:
    return example.id, example.text, example.metadata
