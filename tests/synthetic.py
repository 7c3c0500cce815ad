"""Stores of given rows, made without a model."""

from dataclasses import replace

import numpy as np
from trackstar.curvature import estimate_curvature
from trackstar.gradients.examples import Encoded
from trackstar.gradients.spec import SketchSpec
from trackstar.storage.manifest import Manifest
from trackstar.storage.shard import StoredRows, write_shard
from trackstar.storage.store import open_store
from trackstar.storage.writer import making
from trackstar.storage.writing import write_curvature


def make_store(
    path, shards, *, dtype="float16", wide=None, rotated=None, name=str, metadata=lambda index: ""
):
    """A store whose shards hold these rows, each (n, L, d) float32, not whitened; R_train comes from the first.

    ``rotated`` says whether whitening ends in a random rotation; None: where rows are narrow, as builds do.
    """
    total = sum(len(rows) for rows in shards)
    _, L, d = shards[0].shape
    identity = {
        "spec": SketchSpec(sketch=round(d**0.5)).as_dict(),
        "dtype": dtype,
        "wide": wide,
        "narrowed": None,
        "model": {"class": "none", "parameters": 0, "fingerprint": ""},
        "tokenizer": None,
        "correction": None,
        "curvature": {"sample": len(shards[0]), "damping": 0.1},
        "shard_rows": len(shards[0]),
    }
    begun = Manifest(identity, (L, d), ({"examples": total, "fingerprint": ""},), total)
    with making(path, begun) as writer:
        layout = writer.manifest.layout
        curvature = estimate_curvature(
            [shards[0]], L, d, rotated=layout.narrow if rotated is None else rotated
        )
        writer.commit(replace(writer.manifest, curvature=write_curvature(path, curvature)))
        start = 0
        for rows in shards:
            indices = range(start, start + len(rows))
            examples = [
                Encoded(name(i), f"text {i}", np.zeros(1, np.int32), np.zeros(1, np.int32), metadata(i))
                for i in indices
            ]
            stored = StoredRows.encode(rows, curvature.whitener, layout)
            writer.commit_shard(write_shard(path, layout, start, stored, examples))
            start += len(rows)
    return open_store(path)
