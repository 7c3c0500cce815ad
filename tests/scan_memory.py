"""Run by test_memory.py: prints how much scans of a store add to the memory of the process at most, in bytes each."""

import sys
from pathlib import Path

import torch
from capture_memory import peak
from synthetic import make_store
from trackstar.scoring.scan import plan_scan
from trackstar.scoring.selection import select
from trackstar.storage.store import open_store

BLOCKS, SIZE, SHARD_ROWS, SHARDS = 64, 64, 4000, 5
MEMORY = 26_000_000
CASES = {
    "mixed": {"queries": 40, "mixing": 0.5},
    "not mixed": {"queries": 40, "mixing": 0.0},
    "both directions": {"queries": 40, "mixing": 0.5, "directions": (True, False)},
    "many results": {"queries": 20, "mixing": 0.5, "k": 2000},
    "many queries": {"queries": 600, "mixing": 0.5},
    "scattered rows": {"queries": 40, "mixing": 0.5, "every": 3},
    "int8": {"queries": 40, "mixing": 0.5, "dtype": "int8"},
    "int4": {"queries": 40, "mixing": 0.5, "dtype": "int4"},
    "sign": {"queries": 40, "mixing": 0.5, "dtype": "sign"},
    "int8, not mixed": {"queries": 40, "mixing": 0.0, "dtype": "int8"},
    "int4, not mixed": {"queries": 40, "mixing": 0.0, "dtype": "int4"},
    "sign, not mixed": {"queries": 40, "mixing": 0.0, "dtype": "sign"},
    "int8, rescored": {"queries": 40, "mixing": 0.5, "dtype": "int8", "wide": "float16"},
    "sign, rescored, not mixed": {"queries": 40, "mixing": 0.0, "dtype": "sign", "wide": "float16"},
    "int4, rescored, scattered, both directions": {
        "queries": 40,
        "mixing": 0.5,
        "dtype": "int4",
        "wide": "float16",
        "every": 3,
        "directions": (True, False),
    },
    "many queries, int4": {"queries": 400, "mixing": 0.0, "k": 100, "dtype": "int4"},
    "unlimited": {"queries": 40, "mixing": 0.5, "memory": 10**9},
}


def resident():
    """Memory of this process now, pages of files included; the largest so far starts anew from it."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def store_of(folder, dtype, wide):
    path = folder / f"{dtype}-{wide}"
    if path.exists():
        return open_store(path)
    shards = [torch.randn(SHARD_ROWS, BLOCKS, SIZE) for _ in range(SHARDS if dtype == "float16" else 2)]
    return make_store(path, shards, dtype=dtype, wide=wide)


def main(folder):
    torch.set_num_threads(2)
    for case in [
        {"queries": 40, "mixing": 0.5, "stop": 300},
        *CASES.values(),
    ]:  # the first loads what all need
        store = store_of(Path(folder), case.get("dtype", "float16"), case.get("wide"))
        queries = torch.randn(case["queries"], BLOCKS, SIZE)
        chosen = select(store, range(0, case.get("stop", store.end), case.get("every", 1)))
        options = {"directions": case.get("directions", (True,)), "memory": case.get("memory", MEMORY)}
        scan = plan_scan(store, chosen, len(queries), case.get("k", 10), mixed=case["mixing"] > 0, **options)
        before = resident()
        scan.run(queries, case["mixing"])
        if case in CASES.values():
            print(peak() - before)


if __name__ == "__main__":
    main(sys.argv[1])
