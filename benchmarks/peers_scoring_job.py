"""One job of peers_scoring.py, in the Python of the environment that has the library; prints JSON.

    peers_scoring_job.py LIBRARY ROWS.npy QUERIES.npy K THREADS

"job": seconds from opening the files to the indices; "memory": the largest resident memory on the way, pages of files
included, above that of the process with its libraries loaded; "indices": (Q, K).
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

PIECE = 512
"""Rows that are scored, and in memory, at a time."""

Search = Callable[[str, str, int], list[list[int]]]


def ours(threads: int) -> Search:
    import mmap

    import torch

    from trackstar_kernels.scoring import merge_topk, score_topk

    torch.set_num_threads(threads)

    def search(rows: str, queries: str, k: int) -> list[list[int]]:
        # Mapped copy-on-write: torch takes only arrays it may write to.
        stored, asked = np.load(rows, mmap_mode="c"), torch.from_numpy(np.load(queries))
        best = []
        for start in range(0, len(stored), PIECE):
            piece = torch.from_numpy(stored[start : start + PIECE])
            best.append(score_topk(asked, piece, min(k, len(piece)), start=start))
            # The pages that are surely read; the rest of the last one goes with the next piece.
            end = stored.offset + (start + len(piece)) * stored.strides[0]
            stored._mmap.madvise(mmap.MADV_DONTNEED, 0, end // mmap.PAGESIZE * mmap.PAGESIZE)
        return merge_topk(best, k)[1].tolist()

    return search


def faiss(threads: int) -> Search:
    import faiss

    faiss.omp_set_num_threads(threads)

    def search(rows: str, queries: str, k: int) -> list[list[int]]:
        stored, asked = np.load(rows, mmap_mode="r"), np.load(queries)
        index = faiss.IndexFlatIP(stored.shape[1])
        index.add(stored)
        return index.search(asked, k)[1].tolist()

    return search


def resident(field: str) -> int:
    """Bytes, from /proc: "VmRSS" now, "VmHWM" at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    library, rows, queries, k, threads = sys.argv[1:]
    search = {"ours": ours, "faiss": faiss}[library](int(threads))
    Path("/proc/self/clear_refs").write_text("5")  # the largest so far starts anew
    idle, began = resident("VmRSS"), time.perf_counter()
    indices = search(rows, queries, int(k))
    taken = time.perf_counter() - began
    print(json.dumps({"job": taken, "memory": resident("VmHWM") - idle, "indices": indices}))


if __name__ == "__main__":
    main()
