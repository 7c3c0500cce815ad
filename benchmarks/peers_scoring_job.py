"""One job of peers_scoring.py, in the Python of the environment that has the library.

    peers_scoring_job.py write FOLDER                the rows of FOLDER, written to an index by bergson's own writer
    peers_scoring_job.py LIBRARY FOLDER K THREADS    ours, bergson or faiss; prints JSON

"job": seconds from opening the files to the indices; "memory": the largest resident memory on the way, pages of files
included, above that of the process with its libraries loaded; "indices": (Q, K).
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

BLOCK = 256
"""Numbers of a row that belong to one module."""

MEMORY = 64_000_000
"""Bytes that our scan may take."""

PIECE = 1024
"""Rows that FAISS is given at a time, so that they are in memory once."""

Search = Callable[[Path, np.ndarray, int], list[list[int]]]


def ours(threads: int) -> Search:
    import torch
    from trackstar.scoring.attribution import score_rows
    from trackstar.storage.store import open_store

    torch.set_num_threads(threads)

    def search(folder: Path, queries: np.ndarray, k: int) -> list[list[int]]:
        store = open_store(folder / "store")
        rows = torch.from_numpy(queries).view(len(queries), *store.row_shape)
        return score_rows(store, rows, k=k, mixing=0.0, memory=MEMORY)[1].tolist()

    return search


def bergson(threads: int) -> Search:
    import torch
    from bergson import Attributor

    torch.set_num_threads(threads)

    def search(folder: Path, queries: np.ndarray, k: int) -> list[list[int]]:
        attributor = Attributor(folder / "bergson")
        parts = torch.from_numpy(queries).split(BLOCK, dim=1)
        asked = dict(zip(attributor.ordered_modules, parts, strict=True))
        return attributor.search(asked, k).indices.tolist()

    return search


def faiss(threads: int) -> Search:
    import faiss

    faiss.omp_set_num_threads(threads)

    def search(folder: Path, queries: np.ndarray, k: int) -> list[list[int]]:
        index = faiss.IndexFlatIP(queries.shape[1])
        with (folder / "rows.npy").open("rb") as file:
            np.lib.format.read_magic(file)
            (rows, size), _, dtype = np.lib.format.read_array_header_1_0(file)
            for start in range(0, rows, PIECE):
                piece = np.fromfile(file, dtype, min(PIECE, rows - start) * size)
                index.add(piece.reshape(-1, size).astype(np.float32, copy=False))
        return index.search(queries, k)[1].tolist()

    return search


def write(folder: Path) -> None:
    """FOLDER/bergson of FOLDER/rows.npy."""
    from bergson.data import create_index
    from bergson.gradients import GradientProcessor

    rows = np.load(folder / "rows.npy", mmap_mode="r")
    modules = {f"module{i}": BLOCK for i in range(rows.shape[1] // BLOCK)}
    GradientProcessor().save(folder / "bergson")
    index = create_index(folder / "bergson", len(rows), modules, rows.dtype)
    index[:] = rows
    index.flush()


def resident(field: str) -> int:
    """Bytes, from /proc: "VmRSS" now, "VmHWM" at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
        return
    library, folder, k, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    search = {"ours": ours, "bergson": bergson, "faiss": faiss}[library](threads)
    Path("/proc/self/clear_refs").write_text("5")  # the largest so far starts anew
    idle, began = resident("VmRSS"), time.perf_counter()
    indices = search(folder, np.load(folder / "queries.npy"), k)
    taken = time.perf_counter() - began
    print(json.dumps({"job": taken, "memory": resident("VmHWM") - idle, "indices": indices}))


if __name__ == "__main__":
    main()
