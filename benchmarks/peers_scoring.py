"""Exact search of a file of rows, ours and FAISS's: ``python -m benchmarks.peers_scoring [ENVIRONMENT]``.

The whole job from a cold process with a warm file: 20,000 float32 rows of 7,168 numbers, 100 queries, the ten largest
inner products of each. Makes a virtual environment of the peer's own (downloads from PyPI) unless ENVIRONMENT has one.
Every run is a process of its own (peers_scoring_job.py) and both take turns; time and memory are counted from when its
libraries are loaded, the process's own time stands beside. Stops where the results are not those of float64.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.machine import RESULTS, save
from benchmarks.timing import ratio

FAISS = "faiss-cpu==1.15.1"
ROWS, SIZE, QUERIES, K = 20_000, 7168, 100, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environment", type=Path, nargs="?", default=RESULTS / "faiss-env")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    peer = arguments.environment.resolve() / "bin" / "python"
    if not peer.exists():
        venv.create(arguments.environment, with_pip=True)
        subprocess.run([peer, "-m", "pip", "install", FAISS, f"numpy=={np.__version__}"], check=True)
    pythons = {"ours": Path(sys.executable), "faiss": peer}
    with tempfile.TemporaryDirectory() as folder:
        wanted = write_rows(Path(folder))
        runs = {name: [] for name in pythons}
        for number in range(1 + arguments.rounds):
            for name in reversed(pythons) if number % 2 else pythons:
                run = measure(name, pythons[name], Path(folder), arguments.threads)
                if run.pop("indices") != wanted:
                    raise SystemExit(f"{name} does not find the ten best rows")
                if number > 0:
                    runs[name].append(run)
    print(f"{ROWS} rows of {SIZE}, {QUERIES} queries, k = {K}, {arguments.threads} thread(s)")
    print(f"{'':<6} {'job s':>7} {'process s':>9} {'MB above idle':>13}")
    lines = {
        name: {field: median(run[field] for run in found) for field in found[0]}
        for name, found in runs.items()
    }
    for name, line in lines.items():
        print(f"{name:<6} {line['job']:>7.3f} {line['process']:>9.2f} {line['memory'] / 1e6:>13.0f}")
    jobs = {name: [run["job"] for run in found] for name, found in runs.items()}
    print(
        f"ours ÷ faiss: {ratio(jobs['ours'], jobs['faiss']):.3f} of the time,"
        f" {lines['ours']['memory'] / lines['faiss']['memory']:.3f} of the memory"
    )
    print(f"written: {save('peers-scoring', lines)}")


def write_rows(folder: Path) -> list[list[int]]:
    """Write rows and queries, leave them in the system's cache, and return the indices of the best rows."""
    generator = torch.Generator().manual_seed(0)
    rows, queries = (torch.randn(n, SIZE, generator=generator) for n in (ROWS, QUERIES))
    np.save(folder / "rows.npy", rows.numpy())
    np.save(folder / "queries.npy", queries.numpy())
    exact = torch.cat([queries.double() @ part.double().T for part in rows.split(2000)], 1)
    return exact.topk(K).indices.tolist()


def measure(name: str, python: Path, folder: Path, threads: int) -> dict[str, object]:
    """One job in a process of its own."""
    script = Path(__file__).with_name("peers_scoring_job.py")
    command = [python, script, name, folder / "rows.npy", folder / "queries.npy", str(K), str(threads)]
    began = time.perf_counter()
    finished = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True, stdout=subprocess.PIPE
    )
    return json.loads(finished.stdout) | {"process": time.perf_counter() - began}


if __name__ == "__main__":
    main()
