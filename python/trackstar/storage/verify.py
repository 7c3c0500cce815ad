"""Whether a store is as it was written."""

import math
import os
import random

from trackstar.progress import track
from trackstar.storage.sealed import SealedFolder
from trackstar.storage.store import Store, open_store


def verify_store(path: str | os.PathLike[str] | Store, *, sample: float = 1.0, seed: int = 0) -> list[str]:
    """What is wrong with a store's files, one line each; empty where all is well.

    Reads every byte of R_train, the correction and the lists of shards and deletions, and of the shards themselves or
    a sample of them.

    Args:
        path: the store's folder, or the store.
        sample: share of the shards to read, 0 < sample ≤ 1; at least one is read.
        seed: of their choice.

    Raises:
        ValueError: ``sample`` is out of range.
        FileNotFoundError: there is no store at ``path``.
        StoreError: its manifest is damaged or of another format version.
    """
    if isinstance(sample, bool) or not isinstance(sample, int | float) or not 0 < sample <= 1:
        raise ValueError(f"sample must be a number with 0 < sample ≤ 1, got {sample!r}")
    store = path if isinstance(path, Store) else open_store(path)
    damage = [line for folder in store.folders() for line in folder.damage()]
    if any(line.startswith("index/") for line in damage):
        return damage  # A damaged list of shards cannot be followed.
    records = store.shards.records
    numbers = random.Random(seed).sample(range(len(records)), math.ceil(len(records) * sample))
    chosen = [records[number] for number in sorted(numbers)]
    with track("verifying", sum(record.stop - record.start for record in chosen)) as advance:
        for record in chosen:
            damage += SealedFolder(store.path, record.path, record.seal).damage()
            advance(record.stop - record.start)
    return damage
