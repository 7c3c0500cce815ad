"""Rebuilding the damaged shards of a store, and nothing else."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from trackstar.errors import StoreError
from trackstar.gradients.collector import GradientCollector
from trackstar.gradients.examples import encode_examples
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.losses import output_function
from trackstar.gradients.passes import position_limit, rows_of
from trackstar.progress import console
from trackstar.storage import fingerprint
from trackstar.storage.durable import remove_folder, sync
from trackstar.storage.sealed import SealedFolder
from trackstar.storage.shard import StoredRows, write_shard
from trackstar.storage.store import Store
from trackstar.storage.writer import writing

SCRATCH = "repair"


def repair_store(
    path: str | os.PathLike[str],
    model: nn.Module,
    examples: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
) -> list[str]:
    """Rebuild every shard of which a file is damaged or missing, from the model and the corpus.

    A shard is a pure function of the model, the spec, R_train and its examples, so that what is rebuilt must have the
    very bytes that were committed; nothing else is put in its place.

    Args:
        path: the store's folder.
        model: the model that the store was built with.
        examples: the whole corpus: of the build and of every append, in order.
        tokenizer: the model's, for examples given as text.

    Returns:
        The shards that were rebuilt, as folders below ``path``.

    Raises:
        ValueError: the examples are not as many as the store's rows.
        FileNotFoundError: there is no store at ``path``.
        StoreError: what is damaged is no shard; or the model is another; or what was rebuilt is not what was
            committed, as with other examples, on another machine, or where rows were re-encoded or re-whitened.
        OSError: the disk is full or cannot be written.
    """
    path = Path(path)
    with writing(path) as writer:
        store = Store(path, writer.manifest)
        for folder in store.folders():
            folder.require()
        broken = [
            record for record in store.shards.records if SealedFolder(path, record.path, record.seal).damage()
        ]
        if not broken:
            return []
        fingerprint.require_same(model, tokenizer, store)
        encoded = encode_examples(examples, tokenizer, position_limit(model))
        if len(encoded) != store.end:
            raise ValueError(f"examples must be the store's {store.end}, got {len(encoded)}")
        collector = GradientCollector(model, store.spec, store.correction)
        lean = LeanPass(model, collector.modules.values())
        loss = output_function(store.output)
        for record in broken:
            members = encoded[record.start : record.stop]
            found = rows_of(lean, members, collector, loss=loss)
            rows = StoredRows.encode(found, store.curvature.whitener, store.layout)
            rebuilt = write_shard(path / SCRATCH, store.layout, record.start, rows, members)
            if rebuilt != record:
                remove_folder(path / SCRATCH)
                raise StoreError(
                    f"{path}: {record.path} cannot be rebuilt: what comes of these examples here has other bytes "
                    "than what was committed"
                )
            remove_folder(path / record.path)
            (path / SCRATCH / record.path).rename(path / record.path)
            sync(path / "shards")
            console().print(f"rebuilt {record.path}", soft_wrap=True)
        remove_folder(path / SCRATCH)
    return [record.path for record in broken]
