"""The small model of the ground truth: a Llama of width 64, trained from scratch on Factbook passages in seconds.

Small enough to be trained again on hundreds of subsets of its corpus, so that what a passage really does to an answer
can be measured. Half of its questions are about passages that it was trained on, half about passages held out.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from trackstar.gradients.examples import IGNORED, Encoded, EncodedQuery, encode_examples, encode_queries

from examples.assets import FACTBOOK, unpacked
from examples.corpus import Passage, factbook_passages

FIELDS = (
    "Agricultural products",
    "Capital",
    "Climate",
    "Environmental issues",
    "Exchange rates",
    "Exports - commodities",
    "Exports - partners",
    "Government type",
    "Imports - commodities",
    "Imports - partners",
    "Industries",
    "Languages",
    "Legal system",
    "Location",
    "Map references",
    "Nationality",
    "Natural hazards",
    "Natural resources",
    "Religions",
    "Terrain",
)
"""Fields that every place has, with words that places share: what one passage teaches, others ask for."""

VOCABULARY = 2048

WIDTH = 64

TOKENS = 32
"""Tokens kept of a passage."""

TARGET_TOKENS = 8
"""Tokens of an answer."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """How the small model is trained, and how much it is asked.

    Attributes:
        passages: the training corpus, N.
        queries: Q: half about training passages, half about passages held out.
        epochs: over a training set, whatever its size.
        batch: passages in a step.
        lr: the highest learning rate; it rises over a tenth of the steps and falls in a line to a tenth.
    """

    passages: int = 1000
    queries: int = 80
    epochs: int = 8
    batch: int = 16
    lr: float = 3e-3


@dataclasses.dataclass(frozen=True)
class Texts:
    """What the small model is trained on, and asked.

    Attributes:
        passages: the N training passages, {"id", "text", "input_ids"}.
        queries: {"id", "prompt", "target", "input_ids", "labels"}; an id is that of the passage asked about.
        seen: (Q,) whether the passage asked about is a training passage.
        tokenizer: of VOCABULARY pieces.
    """

    passages: list[dict[str, Any]]
    queries: list[dict[str, Any]]
    seen: list[bool]
    tokenizer: Any

    def encoded(self) -> list[Encoded]:
        """The passages as the model reads them."""
        return encode_examples(self.passages, None)

    def encoded_queries(self) -> list[EncodedQuery]:
        """The queries as the model reads them."""
        return encode_queries(self.queries, self.tokenizer)


def make_texts(setup: Setup) -> Texts:
    """The study's texts, drawn from the Factbook by the hash of their ids."""
    every = [p for p in factbook_passages(unpacked(FACTBOOK)) if p["id"].split("/", 2)[2] in FIELDS]
    return split_texts(every, setup)


def split_texts(passages: Sequence[Passage], setup: Setup) -> Texts:
    """Training passages and queries of ``passages``; the tokenizer knows the words of all of them."""
    tokenizer = make_tokenizer([passage["text"] for passage in passages])
    drawn = sorted(passages, key=lambda passage: hashlib.sha256(passage["id"].encode()).digest())
    asked = setup.queries // 2
    if len(drawn) < setup.passages + asked:
        raise ValueError(f"passages must be at least {setup.passages + asked}, got {len(drawn)}")
    training, held_out = drawn[: setup.passages], drawn[setup.passages : setup.passages + asked]
    kept = [
        passage | {"input_ids": tokenizer(passage["text"])["input_ids"][:TOKENS]}
        for passage in sorted(training, key=lambda passage: passage["id"])
    ]
    queries = [make_query(passage, tokenizer) for passage in [*training[:asked], *held_out]]
    return Texts(kept, queries, [True] * asked + [False] * asked, tokenizer)


def make_query(passage: Mapping[str, str], tokenizer: Any) -> dict[str, Any]:
    """The question that a passage "Place - Field: value" answers: the value, after "Place - Field:"."""
    field = passage["id"].split("/", 2)[2]
    prompt, target = passage["text"].split(f"{field}:", 1)
    before = tokenizer(f"{prompt}{field}:")["input_ids"]
    after = tokenizer(target)["input_ids"][:TARGET_TOKENS]
    return {
        "id": passage["id"],
        "input_ids": before + after,
        "labels": [IGNORED] * len(before) + after,
    }


def make_tokenizer(texts: Sequence[str]) -> Any:
    """Byte-level BPE of VOCABULARY pieces, trained on ``texts``; the same for the same texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_model(seed: int) -> Any:
    """An untrained model: two layers, four heads, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(
    passages: Sequence[Encoded], chosen: Sequence[int] | np.ndarray, seed: int, setup: Setup
) -> tuple[Any, torch.optim.AdamW]:
    """A model trained on the chosen passages, and its optimizer.

    The seed draws the initial weights and, each epoch, an order of ALL passages, of which the chosen are taken: two
    training sets that differ in a passage differ in little else.
    """
    model = make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.lr, betas=(0.9, 0.99), weight_decay=0.01)
    tokens, labels = padded(passages)
    inside = np.zeros(len(passages), dtype=bool)
    inside[np.asarray(chosen)] = True
    steps = setup.epochs * -(-int(inside.sum()) // setup.batch)
    generator = np.random.default_rng(seed)
    step = 0
    for _ in range(setup.epochs):
        order = generator.permutation(len(passages))
        order = order[inside[order]]
        for start in range(0, len(order), setup.batch):
            members = torch.from_numpy(order[start : start + setup.batch])
            for group in optimizer.param_groups:
                group["lr"] = setup.lr * min((step + 1) / (0.1 * steps), 1 - 0.9 * step / steps)
            longest = int((labels[members] != IGNORED).sum(1).max())
            ids, wanted = tokens[members, :longest], labels[members, :longest]
            loss = -log_probabilities(model, ids, wanted).sum() / len(members)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return model.eval(), optimizer


def padded(encoded: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels (N, T) int64, filled up on the right with 0 and with −100."""
    longest = max(len(example) for example in encoded)
    tokens = torch.zeros(len(encoded), longest, dtype=torch.long)
    labels = torch.full_like(tokens, IGNORED)
    for i, example in enumerate(encoded):
        tokens[i, : len(example)] = torch.from_numpy(example.tokens)
        labels[i, : len(example)] = torch.from_numpy(example.labels)
    return tokens, labels


def log_probabilities(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(n,) log p(label) of the n predictions that count, example after example."""
    wanted = labels[:, 1:] != IGNORED
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1][wanted]
    logits = model.lm_head(hidden)
    return -torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted], reduction="none")


@torch.no_grad()
def measure(model: Any, queries: Sequence[EncodedQuery]) -> np.ndarray:
    """(Q,) float64: the log-probability of each query's target, Σ log p."""
    tokens, labels = padded(queries)
    values = log_probabilities(model, tokens, labels).double()
    owner = (labels[:, 1:] != IGNORED).nonzero()[:, 0]
    return torch.zeros(len(queries), dtype=torch.float64).index_add_(0, owner, values).numpy()
