"""Adding documents to a store."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from trackstar.errors import StoreError
from trackstar.gradients.collector import GradientCollector
from trackstar.gradients.examples import Encoded, check_vocabulary, encode_examples
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.losses import output_function
from trackstar.gradients.passes import check_model, position_limit, rows_of, vocabulary_size
from trackstar.progress import console
from trackstar.storage import fingerprint
from trackstar.storage.build import commit_rows
from trackstar.storage.durable import require_disk
from trackstar.storage.index import without_unfinished
from trackstar.storage.manifest import Manifest
from trackstar.storage.shard import example_bytes
from trackstar.storage.store import Store, open_store
from trackstar.storage.writer import writing


def append_store(
    path: str | os.PathLike[str],
    model: nn.Module,
    examples: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    resume: bool = True,
) -> Store:
    """Add documents to a store, or finish what an earlier call with the same documents began.

    The spec, correction, dtype and R_train are the store's: new rows are whitened as those that are there, and
    R_train is not estimated anew, which the call says. Readers go on seeing the store as it was until the last new
    row is committed. Documents that the store ends with already are not added twice.

    Args:
        path: the store's folder.
        model: the model that the store was built with.
        examples: as for :func:`build_store`; a default "id" is the position in the store.
        tokenizer: the model's, for examples given as text.
        resume: False drops what an interrupted append of other documents has written.

    Returns:
        The store, opened.

    Raises:
        ValueError: an argument is not usable.
        FileNotFoundError: there is no store at ``path``.
        StoreError: the store is incomplete, damaged, or of another model or tokenizer; or an append of other documents
            was interrupted; or another process is writing to it.
        OSError: the disk is full or cannot be written; what was committed stays.
        FloatingPointError: an example's gradient is NaN or Inf.
    """
    path = Path(path)
    given = list(examples)
    with writing(path) as writer:
        store = Store(path, writer.manifest)
        store.require_complete()
        fingerprint.require_same(model, tokenizer, store)
        check_model(model)
        manifest, encoded = _extended(path, writer.manifest, given, tokenizer, position_limit(model), resume)
        check_vocabulary(encoded, vocabulary_size(model), "examples")
        first = manifest.total - len(encoded)
        left = encoded[manifest.committed - first :]
        if left:
            needed = len(left) * manifest.layout.row_bytes + example_bytes(left)
            require_disk(path, needed, "the append")
            console().print(
                f"appending {len(encoded)} rows to the {first} of {path}; R_train stays as it is",
                soft_wrap=True,
            )
            writer.commit(manifest)
            collector = GradientCollector(model, store.spec, store.correction)
            lean = LeanPass(model, collector.modules.values())
            loss = output_function(store.output)
            commit_rows(
                writer,
                encoded,
                first,
                store.identity["shard_rows"],
                lambda _, start, stop, advance: rows_of(
                    lean, encoded[start:stop], collector, loss=loss, on_batch=advance
                ),
            )
    return open_store(path)


def _extended(
    path: Path,
    manifest: Manifest,
    examples: list[Mapping[str, Any]],
    tokenizer: Any,
    limit: int | None,
    resume: bool,
) -> tuple[Manifest, list[Encoded]]:
    """The manifest of the store with the examples begun to be added to it, and the examples."""
    last = manifest.parts[-1]
    encoded = encode_examples(examples, tokenizer, limit, first=manifest.total - last["examples"])
    if fingerprint.of_examples(encoded) == last:
        return manifest, encoded
    if resume and manifest.committed > manifest.finished:
        raise StoreError(
            f"an append of {last['examples']} other documents to the store at {path} was interrupted: run it again "
            "to finish it, or append with resume=False to drop what it wrote"
        )
    manifest = without_unfinished(path, manifest)
    encoded = encode_examples(examples, tokenizer, limit, first=manifest.total)
    part = fingerprint.of_examples(encoded)
    return replace(manifest, parts=(*manifest.parts, part), total=manifest.total + len(encoded)), encoded
