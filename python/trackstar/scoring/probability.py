"""How sure a model is of its training examples already: the weights of TRAK."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from trackstar.gradients.examples import IGNORED, Encoded, encode_examples
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.losses import VALUES
from trackstar.gradients.passes import BATCH_TOKENS, has_loss
from trackstar.progress import track
from trackstar.storage import fingerprint
from trackstar.storage.store import Store
from trackstar.storage.stored_examples import stored_parts
from trackstar.storage.writing import read_staged, write_staged


def mean_probabilities(
    lean: LeanPass, examples: Sequence[Encoded], on_batch: Callable[[int], None] = lambda count: None
) -> torch.Tensor:
    """p̄ (n,) float32: the mean, over an example's tokens that count, of the probability that the model gives them.

    1 for an example without such tokens: there is nothing left to learn.
    """
    found = torch.ones(len(examples))
    counted = [i for i, example in enumerate(examples) if has_loss(example)]
    with lean:
        for members in lean.batches([len(examples[i]) for i in counted], BATCH_TOKENS):
            positions = [counted[j] for j in members]
            batch = lean.arrange([examples[i] for i in positions])
            predictions = [int((examples[i].labels[1:] != IGNORED).sum()) for i in positions]
            parts = lean.values(batch, VALUES["loss"]).neg().exp().cpu().split(predictions)
            found[positions] = torch.stack([part.double().mean() for part in parts]).float()
            on_batch(len(members))
    return found


def stored_probabilities(store: Store, model: nn.Module, tokenizer: Any = None) -> torch.Tensor:
    """p̄ (end,) float32 of a store's examples, deleted ones too.

    The first call runs the model forward over all of them, about a third of a build; the result is kept with its
    checksum in STORE/probabilities/, one file for each length of the store.

    Raises:
        StoreError: the model is not the store's, or the store keeps too little of its examples, or the file is damaged.
        OSError: the disk is full or cannot be written.
    """
    fingerprint.require_same(model, tokenizer, store)
    folder = store.path / "probabilities" / f"{store.end:010d}"
    if not folder.is_dir():
        given = [example for part in stored_parts(store) for example in part]
        lean = LeanPass(model, ())
        with track("probabilities", len(given)) as advance:
            found = mean_probabilities(lean, encode_examples(given, None), advance)
        write_staged(folder, found.numpy())
    return torch.from_numpy(read_staged(folder))
