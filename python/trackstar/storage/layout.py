"""How a shard's rows lie on disk: dtypes, shapes and strides, all a function of (dtype, wide, L, d)."""

import dataclasses

import numpy as np

CODES = {
    "float32": ("float32", 1),
    "float16": ("float16", 1),
    "int8": ("int8", 1),
    "int4": ("uint8", 2),
    "sign": ("int32", 32),
}
"""{dtype of a store: (numpy dtype that its codes are kept in, numbers that one of these holds)}, widest first."""

WIDE = ("float32", "float16")
"""Dtypes that hold a row as it is; the others hold codes, with a scale for each row and block."""

LINE = 64
"""Bytes of a cache line."""

SHARD_BYTES = 64 << 20
"""Float32 bytes of a shard's rows: what an interruption can cost."""

OFFSETS = ("tokens", "id", "text", "metadata")
"""Columns of ``offsets``: where an example's tokens begin in ``tokens``, and its strings in ``strings``."""


def row_stride(row_bytes: int) -> int:
    """Bytes from one row to the next: the smallest odd multiple of a cache line that holds a row.

    With an even multiple, above all a power of two, the rows that a kernel reads side by side would fall
    into few of the cache's sets and drive each other out.
    """
    return (-(-row_bytes // LINE) | 1) * LINE


def narrowest(*dtypes: str | None) -> str | None:
    """The narrowest of several dtypes, None where none of them loses anything of float32."""
    order = list(CODES)
    found = max((order.index(dtype) for dtype in dtypes if dtype is not None), default=0)
    return order[found] if found else None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Arrays of a shard.

    Attributes:
        dtype: of the store, a key of :data:`CODES`.
        wide: "float16" or "float32" where a wider copy of the rows lies beside the codes, else None.
        blocks: L.
        size: d.
    """

    dtype: str
    wide: str | None
    blocks: int
    size: int

    @property
    def narrow(self) -> bool:
        """Whether rows are kept as codes with scales."""
        return self.dtype not in WIDE

    @property
    def row_arrays(self) -> tuple[str, ...]:
        """Names of the arrays that hold the rows; every row has as many bytes in each as any other."""
        scales = ("scales",) if self.narrow else ()
        wide = () if self.wide is None else ("wide",)
        return ("rows", *scales, "squared_norms", *wide)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all arrays: those of the rows and those of their examples."""
        return (*self.row_arrays, "offsets", "tokens", "strings")

    def code_shape(self, array: str) -> tuple[int, int]:
        """(L, codes of a block) of a row of ``array``, "rows" or "wide"."""
        return self.blocks, -(-self.size // CODES[self._dtype_of(array)][1])

    def array(self, name: str, count: int) -> tuple[str, tuple[int | None, ...]]:
        """The dtype, and the shape, of an array of ``count`` rows; None where the examples decide."""
        if name in ("rows", "wide"):
            dtype, _ = CODES[self._dtype_of(name)]
            blocks, codes = self.code_shape(name)
            itemsize = np.dtype(dtype).itemsize
            return dtype, (count, row_stride(blocks * codes * itemsize) // itemsize)
        if name in ("scales", "squared_norms"):
            return "float32", (count, self.blocks)
        if name == "offsets":
            return "int64", (count + 1, len(OFFSETS))
        return {"tokens": "int32", "strings": "uint8"}[name], (None,)

    @property
    def shard_rows(self) -> int:
        """Examples per shard, where nothing else is said."""
        return min(max(SHARD_BYTES // (4 * self.blocks * self.size), 16), 4096)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in all of :attr:`row_arrays`."""
        total = 0
        for name in self.row_arrays:
            dtype, (_, width) = self.array(name, 1)
            total += np.dtype(dtype).itemsize * (width or 0)
        return total

    def _dtype_of(self, array: str) -> str:
        return self.wide if array == "wide" and self.wide is not None else self.dtype
