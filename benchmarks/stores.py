"""Stores of given rows, made without a model."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from trackstar.curvature import Curvature
from trackstar.gradients.examples import Encoded
from trackstar.gradients.spec import SketchSpec
from trackstar.storage.manifest import Manifest
from trackstar.storage.shard import StoredRows, write_shard
from trackstar.storage.store import Store, open_store
from trackstar.storage.writer import making
from trackstar.storage.writing import write_curvature


def write_store(
    path: Path, shards: Iterable[torch.Tensor], total: int, curvature: Curvature, dtype: str
) -> Store:
    """A store of ``total`` rows, given shard by shard as (n, L, d) float32, not whitened."""
    blocks, size = curvature.eigenvalues.shape
    identity = {"spec": SketchSpec().as_dict(), "dtype": dtype, "wide": None, "correction": None}
    begun = Manifest(identity, (blocks, size), ({"examples": total, "fingerprint": ""},), total)
    nothing, start = np.zeros(1, np.int32), 0
    with making(path, begun) as writer:
        layout = writer.manifest.layout
        writer.commit(dataclasses.replace(writer.manifest, curvature=write_curvature(path, curvature)))
        for rows in shards:
            examples = [Encoded(str(start + i), "", nothing, nothing) for i in range(len(rows))]
            stored = StoredRows.encode(rows, curvature.whitener, layout)
            writer.commit_shard(write_shard(path, layout, start, stored, examples))
            start += len(rows)
    return open_store(path)


def no_curvature(blocks: int, size: int) -> Curvature:
    """R_train = I: rows are stored as they are."""
    unit = torch.eye(size, dtype=torch.float64).expand(blocks, size, size).contiguous()
    damping = torch.zeros(blocks, dtype=torch.float64)
    eigenvalues = torch.ones(blocks, size, dtype=torch.float64)
    return Curvature(unit, damping, eigenvalues, unit.float())
