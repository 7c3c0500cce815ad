"""Handing a store's rows to other tools, in one file: Parquet, Arrow, or numpy's own format."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trackstar.progress import track
from trackstar.storage.durable import new_file, require_disk
from trackstar.storage.store import Store

BATCH = 16 << 20
"""Float32 bytes of the rows that are in memory at a time."""

DTYPES = ("float32", "float16")

SUFFIXES = (".parquet", ".arrow", ".npy")


def export_rows(store: Store, path: str | os.PathLike[str], *, dtype: str = "float32") -> int:
    """Write the whitened rows of a store, the deleted ones left out, to a file that appears whole or not at all.

    - ``.parquet`` and ``.arrow`` (the IPC file format) have the columns index int64, id and text strings, metadata a
      string of JSON, null where there is none, and row, a fixed-size list of L·d numbers, block after block. The
      schema's metadata has ``trackstar.row_shape``, "L,d". They need pyarrow (``pip install 'trackstar[arrow]'``).
    - ``.npy`` has the rows alone, (N, L, d), in the order of their indices.

    Memory does not grow with the store.

    Args:
        store: a complete store.
        path: the file; replaced as a whole.
        dtype: "float32" or "float16", of the numbers; codes are widened.

    Returns:
        Rows that were written.

    Raises:
        ValueError: the name ends otherwise, or ``dtype`` is unknown.
        ImportError: pyarrow is needed and missing.
        StoreError: the store is incomplete or damaged.
        OSError: the disk is full or cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path must end with {', '.join(SUFFIXES)}; got {path.name!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    store.require_complete()
    blocks, size = store.row_shape
    require_disk(path.parent, len(store) * blocks * size * np.dtype(dtype).itemsize, "the export")
    write = _write_npy if path.suffix == ".npy" else _write_arrow
    with new_file(path) as temporary:
        write(store, temporary, dtype, path.suffix)
    return len(store)


def _batches(store: Store, dtype: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices (n,) and rows (n, L, d) of what is not deleted, a batch at a time."""
    blocks, size = store.row_shape
    count = max(1, BATCH // (4 * blocks * size))
    with track("exporting", store.end, passing=True) as advance:
        for shard in store.shards:
            live = shard.start + shard.live.numpy()
            for start in range(shard.start, shard.stop, count):
                stop = min(start + count, shard.stop)
                indices = live[(live >= start) & (live < stop)]
                rows = shard.floats(start, stop).numpy()[indices - start]
                if len(indices):
                    yield indices, rows.astype(dtype, copy=False)
                advance(stop - start)


def _write_npy(store: Store, path: Path, dtype: str, suffix: str) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": (len(store), *store.row_shape),
    }
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _, rows in _batches(store, dtype):
            file.write(np.ascontiguousarray(rows).data)


def _write_arrow(store: Store, path: Path, dtype: str, suffix: str) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(
            f"writing {suffix} needs the package pyarrow: pip install 'trackstar[arrow]'"
        ) from None
    blocks, size = store.row_shape
    number = pa.from_numpy_dtype(np.dtype(dtype))
    schema = pa.schema(
        [
            ("index", pa.int64()),
            ("id", pa.string()),
            ("text", pa.string()),
            ("metadata", pa.string()),
            ("row", pa.list_(number, blocks * size)),
        ],
        metadata={"trackstar.row_shape": f"{blocks},{size}"},
    )
    with contextlib.ExitStack() as stack:
        if suffix == ".parquet":
            # Gradients do not compress, and a dictionary of them is a second copy.
            writer: Any = stack.enter_context(
                pq.ParquetWriter(path, schema, use_dictionary=False, compression={"text": "zstd"})
            )
        else:
            writer = stack.enter_context(pa.ipc.new_file(str(path), schema))
        for indices, rows in _batches(store, dtype):
            flat = pa.array(np.ascontiguousarray(rows).reshape(-1), number)
            metadata = [store.metadata(i) for i in indices.tolist()]
            columns = [
                pa.array(indices, pa.int64()),
                pa.array([store.id(i) for i in indices.tolist()], pa.string()),
                pa.array([store.text(i) for i in indices.tolist()], pa.string()),
                pa.array([json.dumps(m, ensure_ascii=False) if m else None for m in metadata], pa.string()),
                pa.FixedSizeListArray.from_arrays(flat, blocks * size),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
