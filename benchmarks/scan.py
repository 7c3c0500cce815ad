"""What reading a store costs a scan: ``python -m benchmarks.scan [--rounds N]``.

The scan of the engine, which reads ahead and lets go, beside scoring shard by shard as they are mapped, with the file
in memory and put out of it; and the same rows as one tensor in memory, which is what cannot be beaten. Times are the
wall's: reading is other processors' work and the disk's.
"""

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from trackstar.curvature import estimate_curvature
from trackstar.scoring.scan import plan_scan
from trackstar.scoring.selection import select

from benchmarks.machine import save
from benchmarks.stores import write_store
from benchmarks.timing import ratio
from trackstar_kernels.scoring import merge_topk, prepare_task

BLOCKS, SIZE, SHARD_ROWS, SHARDS = 16, 256, 4096, 20
QUERIES = (1, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        store = random_store(Path(folder) / "store")
        lines = [line for Q in QUERIES for line in measure(store, torch.randn(Q, BLOCKS, SIZE), rounds)]
    print(f"written: {save('scan', lines)}")


def random_store(path):
    """A float16 store of random rows."""
    first = torch.randn(SHARD_ROWS, BLOCKS, SIZE)
    others = (torch.randn(SHARD_ROWS, BLOCKS, SIZE) for _ in range(1, SHARDS))
    curvature = estimate_curvature([first], BLOCKS, SIZE)
    return write_store(path, itertools.chain([first], others), SHARDS * SHARD_ROWS, curvature, "float16")


def measure(store, queries, rounds):
    scan = plan_scan(store, select(store), len(queries), 10)
    task = prepare_task(queries, 0.5)
    codes, norms = (
        torch.cat([getattr(s, name) for s in store.shards]) for name in ("codes", "squared_norms")
    )

    def mapped():
        return merge_topk([task.topk(s.codes, s.squared_norms, 10, start=s.start) for s in store.shards], 10)

    runs = {
        "in memory": lambda: prepare_task(queries, 0.5).topk(codes, norms, 10),
        "mapped": mapped,
        "scan": lambda: scan.run(queries, 0.5)[0],
    }
    answers = [run()[1] for run in runs.values()]
    if not all(torch.equal(answer, answers[0]) for answer in answers):
        raise SystemExit("the scans do not agree")
    size = store.end * store.layout.row_bytes
    for cold in (False, True):
        seconds = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                if cold and name != "in memory":
                    put_out(store)
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
        state = "cold" if cold else "warm"
        figures = {name: median(taken) for name, taken in seconds.items()}
        relative = ratio(seconds["scan"], seconds["mapped"])
        print(
            f"Q = {len(queries):2}, {state} file: "
            + ", ".join(f"{name} {1e3 * taken:6.0f} ms" for name, taken in figures.items())
            + f"; scan ÷ mapped {relative:.2f}, {size / figures['scan'] / 1e9:.1f} GB/s",
            flush=True,
        )
        yield {"Q": len(queries), "file": state, "bytes": size, "seconds": figures, "scan / mapped": relative}


def put_out(store):
    """Have the system forget what it keeps of the rows' files."""
    for file in store.path.rglob("data.ninja"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
