"""A second store of the same examples, for methods that score other rows than a store holds."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from trackstar.errors import StoreError
from trackstar.progress import console
from trackstar.scoring.methods import GRADIENTS, fits, held_rows, require_method, wanted_rows
from trackstar.storage import fingerprint
from trackstar.storage.append import append_store
from trackstar.storage.build import SAMPLE, build_store
from trackstar.storage.deletion import delete_rows
from trackstar.storage.store import Store, open_store
from trackstar.storage.stored_examples import stored_parts


def companion_store(
    store: Store,
    model: nn.Module,
    method: str,
    *,
    tokenizer: Any = None,
    path: str | os.PathLike[str] | None = None,
) -> Store:
    """A store of the same examples with the rows that ``method`` scores: ``store`` itself where it has them.

    Otherwise the companion at ``path``, built on the first call from the store's own tokens, with its spec, dtype and
    sample, without a correction and, where the method asks for it, of the margin. Says what is missing and, as every
    build, what memory, disk and time that takes; may be killed, and goes on. Examples that the store gained, or lost,
    since then are added, or deleted, there too: row i is the same example in both.

    Args:
        store: a complete store.
        model: the model that the store was built with.
        method: a name in :data:`trackstar.scoring.methods.METHODS`.
        tokenizer: the model's, where the store was built with one.
        path: of the companion; None for the store's with ".uncorrected" or ".margin" added.

    Raises:
        ValueError: there is no such method, or it needs a correction that the store was built without.
        StoreError: the store keeps too little of its examples (labels of their own); or the model is another; or
            ``path`` holds something else.
        OSError: the disk is full or cannot be written; what was committed stays.
    """
    require_method(method)
    if method not in GRADIENTS or fits(GRADIENTS[method], store):
        return store
    rows = GRADIENTS[method]
    if rows.corrected:
        raise ValueError(
            f"method {method} needs a store of {wanted_rows(rows, store)}, {store.path} holds {held_rows(store)}: "
            "build one with a correction"
        )
    store.require_complete()
    output = rows.output or store.output
    suffix = "uncorrected" if output == store.output else output
    path = Path(path) if path is not None else store.path.with_name(f"{store.path.name}.{suffix}")
    if _serves(path, store, output):
        return open_store(path)
    fingerprint.require_same(model, tokenizer, store)
    console().print(
        f"method {method} needs {wanted_rows(rows, store)}; {store.path} holds {held_rows(store)}: "
        f"building {path} from its examples, once",
        soft_wrap=True,
    )
    first, *later = stored_parts(store)
    found = build_store(
        path,
        model,
        first,
        tokenizer=tokenizer,
        spec=store.spec,
        output=output,
        dtype=store.dtype,
        wide=store.wide_dtype,
        sample=store.identity["curvature"].get("sample") or SAMPLE,
        shard_rows=store.identity["shard_rows"],
    )
    for part in later[len(found.parts) - 1 :]:
        found = append_store(path, model, part, tokenizer=tokenizer)
    delete_rows(path, store.deleted.tolist())
    if not _serves(path, store, output):
        raise StoreError(
            f"{path} holds other examples than {store.path}: name another folder for the companion"
        )
    return open_store(path)


def _serves(path: Path, store: Store, output: str) -> bool:
    """Whether the companion at ``path`` is there and has a store's examples, all of them and no others."""
    if not (path / "manifest.json").exists():
        return False
    found = open_store(path)
    ours, theirs = (
        (s.identity["spec"], s.identity["model"], s.parts, s.deleted.tolist()) for s in (store, found)
    )
    return (
        found.complete and found.identity["correction"] is None and found.output == output and ours == theirs
    )
