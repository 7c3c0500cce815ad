"""A store's examples as they were given, for what runs the model over them again."""

from typing import Any

from trackstar.errors import StoreError
from trackstar.gradients.examples import encode_examples
from trackstar.storage.fingerprint import of_examples
from trackstar.storage.store import Store


def stored_parts(store: Store) -> list[list[dict[str, Any]]]:
    """The examples of the build, and of every append and merge, as :func:`encode_examples` takes them.

    Deleted ones are among them. A store keeps tokens and no labels: where labels left tokens out, the checksum of the
    part tells.

    Raises:
        StoreError: a part was of examples with labels of their own, or a shard is damaged.
    """
    shards = iter(store.shards)
    shard = next(shards)
    parts, start = [], 0
    for part in store.parts:
        given = []
        for index in range(start, start + part["examples"]):
            while index >= shard.stop:
                shard = next(shards)
            given.append(shard.example(index))
        if of_examples(encode_examples(given, None)) != part:
            raise StoreError(
                f"the examples of {store.path} had labels of their own, which a store does not keep: "
                "build a store of the rows that are needed from the examples themselves"
            )
        parts.append(given)
        start += part["examples"]
    return parts
