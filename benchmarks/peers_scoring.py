"""A whole search of stored rows, ours, bergson's and FAISS's: ``python -m benchmarks.peers_scoring [ENVIRONMENT]``.

From a cold process with warm files: 20,000 unit rows of 7,168 numbers, 100 unit queries, the ten largest inner products
of each, which are the cosines that TrackStar scores with. We open a store, checksums compared, and scan it; bergson's
Attributor loads its index and searches it; FAISS builds a Flat index of a file and searches it. Makes a virtual
environment of the peers' own (6 GB; downloads from PyPI) unless ENVIRONMENT has one. Every run is a process of
its own (peers_scoring_job.py) and all take turns; time and memory are counted from when the libraries are loaded, the
process's own time stands beside. Stops where the results are not those of float64.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.machine import save
from benchmarks.peers_environment import ENVIRONMENT, OFFLINE, python_of
from benchmarks.peers_scoring_job import BLOCK
from benchmarks.stores import no_curvature, write_store
from benchmarks.targets import compare
from benchmarks.timing import ratio

ROWS, SIZE, QUERIES, K = 20_000, 7168, 100, 10

SHARD_ROWS = 2000
"""As a build has it: 64 MB of float32."""

SCRIPT = Path(__file__).with_name("peers_scoring_job.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environment", type=Path, nargs="?", default=ENVIRONMENT)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "float16"), default=["float32", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    peers = python_of(arguments.environment)
    pythons = {"ours": Path(sys.executable), "bergson": peers, "faiss": peers}
    print(f"{ROWS} rows of {SIZE}, {QUERIES} queries, k = {K}, {arguments.threads} thread(s)")
    lines, reached = [], {}
    for dtype in arguments.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            wanted = write_rows(Path(folder), dtype, peers)
            runs = {name: [] for name in pythons}
            for number in range(1 + arguments.rounds):
                for name in reversed(pythons) if number % 2 else pythons:
                    run = measure(name, pythons[name], Path(folder), arguments.threads)
                    if run.pop("indices") != wanted:
                        raise SystemExit(f"{name} does not find the ten best rows")
                    if number > 0:
                        runs[name].append(run)
        lines += report(dtype, runs)
        reached |= ratios(dtype, runs)
    targets = compare(reached)
    print(f"written: {save('peers-scoring', {'lines': lines, 'targets': targets})}")


def write_rows(folder: Path, dtype: str, peers: Path) -> list[list[int]]:
    """Write rows and queries for all, which leaves them in the system's cache; the indices of the best rows."""
    generator = torch.Generator().manual_seed(0)
    rows, queries = (
        torch.nn.functional.normalize(torch.randn(n, SIZE, generator=generator)) for n in (ROWS, QUERIES)
    )
    rows = rows.to(getattr(torch, dtype))
    np.save(folder / "rows.npy", rows.numpy())
    np.save(folder / "queries.npy", queries.numpy())
    blocks = SIZE // BLOCK
    shards = (part.float().view(-1, blocks, BLOCK) for part in rows.split(SHARD_ROWS))
    write_store(folder / "store", shards, ROWS, no_curvature(blocks, BLOCK), dtype)
    subprocess.run([peers, SCRIPT, "write", folder], env=os.environ | OFFLINE, check=True, stdout=sys.stderr)
    exact = torch.cat([queries.double() @ part.double().T for part in rows.split(2000)], 1)
    return exact.topk(K).indices.tolist()


def measure(name: str, python: Path, folder: Path, threads: int) -> dict[str, object]:
    """One job in a process of its own."""
    # Modules are compiled once, as an installation compiles them.
    own = OFFLINE | {"OMP_NUM_THREADS": str(threads), "PYTHONDONTWRITEBYTECODE": ""}
    began = time.perf_counter()
    finished = subprocess.run(
        [python, SCRIPT, name, folder, str(K), str(threads)],
        env=os.environ | own,
        check=True,
        stdout=subprocess.PIPE,
    )
    taken = time.perf_counter() - began
    return json.loads(finished.stdout.splitlines()[-1]) | {"process": taken}


def report(dtype: str, runs: dict[str, list[dict[str, float]]]) -> list[dict[str, object]]:
    """Print the medians, and return them for JSON."""
    print(f"\n{dtype:<8} {'job s':>7} {'process s':>9} {'MB above idle':>13}")
    lines = []
    for name, found in runs.items():
        line = {field: median(run[field] for run in found) for field in found[0]}
        print(
            f"{name:<8} {line['job']:>7.3f} {line['process']:>9.2f} {line['memory'] / 1e6:>13.0f}", flush=True
        )
        lines.append({"library": name, "dtype": dtype} | line)
    return lines


def ratios(dtype: str, runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Ours ÷ each peer's, time and memory."""
    fields = {
        name: {field: [run[field] for run in found] for field in found[0]} for name, found in runs.items()
    }
    return {
        f"{label} ÷ {peer}, {dtype}": ratio(fields["ours"][field], fields[peer][field])
        for peer in ("bergson", "faiss")
        for field, label in (("job", "search from files"), ("memory", "its memory"))
    }


if __name__ == "__main__":
    main()
