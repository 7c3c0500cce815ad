"""What a store costs beside its rows: ``python -m benchmarks.store [--rounds N]``.

Opening and committing at any number of shards (whose lists alone exist: opening reads no shard), and comparing a
shard's bytes with their checksums, against hashing the same bytes in memory and reading them.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
import xxhash
from trackstar.gradients.examples import Encoded
from trackstar.storage.durable import new_folder
from trackstar.storage.index import with_shard
from trackstar.storage.layout import Layout
from trackstar.storage.manifest import Manifest, ShardRecord
from trackstar.storage.sealed import Seal, SealedFolder
from trackstar.storage.shard import StoredRows, write_shard
from trackstar.storage.store import open_store

from benchmarks.machine import save
from benchmarks.timing import interleaved

SHARDS = (1, 1_000, 10_000, 100_000)
ROWS = 291  # of a shard of 64 MB of float32, at D = 57,600
BLOCKS, SIZE = 225, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = [*opening(Path(folder), rounds), checking(Path(folder), rounds)]
    print(f"written: {save('store', lines)}")


def opening(root: Path, rounds: int) -> list[dict[str, float]]:
    lines = []
    print(f"{'shards':>8} {'manifest':>10} {'open':>9} {'find a row':>11} {'commit':>9}")
    for count in SHARDS:
        path = root / str(count)
        manifest = listed(path, count)
        store = open_store(path)
        assert (len(store), len(store.shards)) == (count * ROWS, count)
        middle = count * ROWS // 2
        shard = store.shards[store.shards.find(middle)]
        assert shard.start <= middle < shard.stop

        def find(path: Path = path, middle: int = middle) -> None:
            shards = open_store(path).shards
            shards[shards.find(middle)]

        runs = {
            "open": lambda path=path: len(open_store(path)),
            "find": find,
            "commit": lambda path=path, manifest=manifest: manifest.write(path),
        }
        seconds = {name: median(times) for name, times in interleaved(runs, rounds).items()}
        size = (path / "manifest.json").stat().st_size
        shown = "  ".join(f"{1e3 * seconds[name]:>6.2f} ms" for name in runs)
        print(f"{count:>8,} {size / 1e3:>7.1f} kB {shown}")
        lines.append({"shards": count, "manifest_bytes": size} | seconds)
    return lines


def listed(path: Path, count: int) -> Manifest:
    """A store of ``count`` shards of which only the records exist."""
    path.mkdir()
    total = count * ROWS
    identity = {"dtype": "int8", "wide": None}
    manifest = Manifest(identity, (BLOCKS, SIZE), ({"examples": total, "fingerprint": "0" * 32},), total)
    for i in range(count):
        record = ShardRecord(i * ROWS, (i + 1) * ROWS, Seal(1 << 24, f"{i * 0x9E3779B97F4A7C15:032x}"))
        manifest = with_shard(path, manifest, record)
    manifest = dataclasses.replace(manifest, finished=total)
    manifest.write(path)
    return manifest


def checking(root: Path, rounds: int) -> dict[str, float]:
    """A shard of int8 rows, warm in the system's cache."""
    layout = Layout("int8", None, BLOCKS, SIZE)
    rows = torch.randn(ROWS, BLOCKS, SIZE, generator=torch.Generator().manual_seed(0))
    examples = [Encoded("", "", np.zeros(0, np.int32), np.zeros(0, np.int32))] * ROWS
    record = write_shard(root, layout, 0, StoredRows.encode(rows, None, layout), examples)
    folder = SealedFolder(root, record.path, record.seal)
    assert folder.damage() == []
    content = (folder.path / "rows/data.ninja").read_bytes()

    def write() -> None:
        with new_folder(root / "copy", len(content)) as copy:
            (copy / "data").write_bytes(content)

    runs = {
        "compared with checksums": folder.damage,
        "hashed in memory": lambda: xxhash.xxh3_128(content).digest(),
        "read": (folder.path / "rows/data.ninja").read_bytes,
        "written and synced": write,
    }
    seconds = interleaved(runs, rounds)
    rates = {name: record.seal.bytes / median(times) / 1e9 for name, times in seconds.items()}
    print(f"\na shard of {record.seal.bytes / 1e6:.1f} MB")
    for name, rate in rates.items():
        print(f"{name:<24} {rate:>6.1f} GB/s of processor time")
    return {"shard_bytes": record.seal.bytes} | rates


if __name__ == "__main__":
    main()
