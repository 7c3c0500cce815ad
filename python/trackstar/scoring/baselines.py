"""The methods that are no gradients at all: what words share, and what an encoder takes for alike."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trackstar.gradients.examples import EncodedQuery, encode_queries, length_batches
from trackstar.progress import track
from trackstar.scoring.selection import Selection, shards_of
from trackstar.storage.store import Store

BATCH_TOKENS = 4096
"""Tokens that an encoder gets at a time."""


def chosen_texts(store: Store, chosen: Selection) -> tuple[list[str], torch.Tensor]:
    """Texts, and rows (n,) int64, of the chosen examples."""
    found = [
        (shard.text(row), row)
        for shard in shards_of(store, chosen)
        for start, stop in chosen.within(shard.start, shard.stop)
        for row in range(start, stop)
    ]
    return [text for text, _ in found], torch.tensor([row for _, row in found])


def read_queries(queries: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[EncodedQuery]:
    """Queries with their texts, which need no tokenizer where they are given as "prompt" and "target".

    Raises:
        ValueError: there are none, or one has no text.
    """
    if tokenizer is not None:
        encoded = encode_queries(queries, tokenizer)
    elif not queries:
        raise ValueError("queries must hold at least one query, got none")
    else:
        none = np.zeros(0, np.int32)
        encoded = []
        for i, query in enumerate(queries):
            prompt, target = (query.get(field) for field in ("prompt", "target"))
            if not isinstance(prompt, str) or not isinstance(target, str):
                raise ValueError(f'queries[{i}] must have "prompt" and "target" where there is no tokenizer')
            name = str(query.get("id", i))
            encoded.append(EncodedQuery(name, prompt + target, none, none, prompt=prompt, target=target))
    for i, found in enumerate(encoded):
        if not found.text.strip():
            raise ValueError(f"queries[{i}] must have text for a method that reads it, got none")
    return encoded


def bm25_scores(queries: Sequence[str], texts: Sequence[str]) -> torch.Tensor:
    """BM25 (Q, n) float32: the sum, over the words w of a query that are in a text, as often as the query has them, of

        log(1 + (n − n_w + ½) / (n_w + ½)) · f_w / (f_w + 1.5 · (¼ + ¾ · length / mean length))

    with f_w the times that w is in the text and n_w the texts that it is in. Words are runs of at least two letters,
    digits and underscores in lower case, not stemmed, without the commonest English ones: as bm25s takes a text apart.

    Raises:
        ImportError: bm25s is not installed.

    Source: Robertson and Zaragoza 2009, as bm25s has it (arXiv 2407.03618, Lucene's form).
    """
    try:
        import bm25s
    except ImportError:
        raise ImportError("method bm25 needs bm25s: pip install 'trackstar[bm25]'") from None
    given, asked = (
        bm25s.tokenize(list(side), return_ids=False, show_progress=False) for side in (texts, queries)
    )
    scores = torch.zeros(len(queries), len(texts))
    if not any(given):
        return scores
    index = bm25s.BM25()
    index.index(given, show_progress=False)
    known = {word for words in given for word in words}
    for query, out in zip(asked, scores, strict=True):
        words = [word for word in query if word in known]
        if words:
            out.copy_(torch.from_numpy(index.get_scores(words)))
    return scores


class Encoder:
    """A sentence-transformers model, run through transformers: a transformer, pooling, and perhaps a norm of 1.

    Args:
        folder: where its modules.json is; nothing is downloaded.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has modules, or a kind of pooling, that are not known here.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        import transformers

        folder = Path(folder)
        if not (folder / "modules.json").is_file():
            raise FileNotFoundError(
                f"encoder must be a folder of a sentence-transformers model (modules.json), got {folder}"
            )
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise ValueError(
                f"encoder must be a Transformer, Pooling and perhaps Normalize, {folder} has {', '.join(kinds)}"
            )
        self._normalized = "Normalize" in kinds
        pooling = json.loads((folder / modules[1]["path"] / "config.json").read_text(encoding="utf-8"))
        modes = [
            name for name, chosen in pooling.items() if name.startswith("pooling_mode_") and chosen is True
        ]
        if modes not in (["pooling_mode_mean_tokens"], ["pooling_mode_cls_token"]):
            raise ValueError(
                f"encoder must pool by mean or first token, {folder} has {', '.join(modes) or 'none'}"
            )
        self._mean = modes == ["pooling_mode_mean_tokens"]
        transformer = folder / modules[0]["path"]
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(transformer, local_files_only=True)
        self._model = transformers.AutoModel.from_pretrained(
            transformer, local_files_only=True, dtype=torch.float32
        ).eval()
        limits = [self._model.config.max_position_embeddings]
        settings = folder / "sentence_bert_config.json"
        if settings.is_file():
            limits.append(json.loads(settings.read_text(encoding="utf-8")).get("max_seq_length"))
        self._longest = min(limit for limit in limits if limit is not None)

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings (n, features) float32, of norm 1 where the model says so; longer texts are cut."""
        ids = self._tokenizer(list(texts), truncation=True, max_length=self._longest)["input_ids"]
        found = torch.empty(len(ids), self._model.config.hidden_size)
        with track("embedding", len(ids), passing=True) as advance, torch.no_grad():
            for members in length_batches([len(tokens) for tokens in ids], BATCH_TOKENS):
                longest = max(len(ids[i]) for i in members)
                tokens, mask = torch.zeros(2, len(members), longest, dtype=torch.long)
                for row, i in enumerate(members):
                    tokens[row, : len(ids[i])] = torch.tensor(ids[i])
                    mask[row, : len(ids[i])] = 1
                hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state
                if self._mean:
                    found[members] = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                else:
                    found[members] = hidden[:, 0]
                advance(len(members))
        return torch.nn.functional.normalize(found) if self._normalized else found

    def scores(self, queries: Sequence[str], texts: Sequence[str]) -> torch.Tensor:
        """Cosines (Q, n) float32 of the embeddings."""
        asked, given = (torch.nn.functional.normalize(self.embed(side)) for side in (queries, texts))
        return asked @ given.T
