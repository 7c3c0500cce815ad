"""Gold that looks like an opponent: at which of a passage's tokens its score by TrackStar is made.

A score is a sum over the passage's tokens, each standing for the gradient at its place, where the model predicts the
next one. Terms are added up by what is predicted there: the passage's heading (its subject's name or its field, up to
the colon), the answer, or anything else.
"""

import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from trackstar.scoring.attribution import whiten
from trackstar.scoring.terms import block_terms, token_terms

from experiments import corpus
from experiments.ladder import TRACKSTAR, scored
from experiments.provenance import checkpoint, load_model, questions
from experiments.scores import automatic_mixing
from experiments.stores import built, passage_rows, question_rows
from experiments.study import Study, study

PLACES = ("heading", "answer", "else")

LOWEST = 10
"""Questions that are reported token by token."""


def main(argv: list[str] | None = None) -> int:
    """Take every question's first gold passage apart."""
    here = study(__doc__, argv)
    passages, _ = corpus.load(here)
    asked = questions(here)
    texts = {passage["id"]: passage["text"] for passage in passages}
    positions = {passage["id"]: i for i, passage in enumerate(passages)}
    gold = [question["gold"][0] for question in asked]
    found = scored(here, TRACKSTAR)
    chosen = torch.tensor([positions[name] for name in gold])
    terms, tokens = gold_terms(here, asked, chosen, [texts[name] for name in gold])
    rows: list[dict[str, Any]] = []
    for q, question in enumerate(asked):
        spans, pieces = tokens[q]
        score = found[q, chosen[q]]
        by_place = sums_by_place(terms[q], spans, texts[gold[q]], question["target"].strip())
        rows.append(
            {
                "id": question["id"],
                "prompt": question["prompt"],
                "target": question["target"],
                "passage": texts[gold[q]],
                "score": score.item(),
                "rank": 1 + int((found[q] > score).sum()),
                "tokens": [[piece, term] for piece, term in zip(pieces, terms[q].tolist(), strict=True)],
            }
            | by_place
        )
    rows.sort(key=lambda row: row["score"])
    groups = {
        "below 0": [row for row in rows if row["score"] < 0],
        "above 0": [row for row in rows if row["score"] >= 0],
    }
    results = {
        "mean terms of gold": [summary(name, group) for name, group in groups.items() if group],
        "lowest": rows[:LOWEST],
    }
    for line in results["mean terms of gold"]:
        print(line, flush=True)
    here.write("opponents", results)
    return 0


def gold_terms(
    here: Study, asked: Sequence[dict[str, Any]], chosen: torch.Tensor, texts: Sequence[str]
) -> tuple[list[torch.Tensor], list[tuple[list[tuple[int, int]], list[str]]]]:
    """For each question the terms (T,) of its passage's tokens, and these tokens' spans and pieces of the text.

    Args:
        here: the study.
        asked: the Q questions.
        chosen: (Q,) int64, each question's passage.
        texts: those passages.
    """
    store = built(here)
    rows = question_rows(here, store, asked)
    mixing = automatic_mixing(passage_rows(store), rows)
    model, tokenizer = load_model(checkpoint(here))
    indices = chosen[:, None]
    found = token_terms(store, model, block_terms(store, whiten(store, rows), mixing, indices), indices)
    tokens = []
    for text in texts:
        spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        tokens.append((spans, [text[start:stop] for start, stop in spans]))
    return [terms[0] for terms in found], tokens


def sums_by_place(
    terms: torch.Tensor, spans: Sequence[tuple[int, int]], text: str, answer: str
) -> dict[str, float]:
    """Terms (T,) added up by what is predicted at each token: the next one.

    Args:
        terms: of the tokens of ``text``.
        spans: where each stands.
        text: a passage "heading: …".
        answer: words that stand in it, perhaps.
    """
    colon = text.find(":")
    match = re.search(rf"\b{re.escape(answer)}\b", text[colon + 1 :], re.IGNORECASE)
    first, last = (match.start() + colon + 1, match.end() + colon + 1) if match else (0, 0)
    sums = dict.fromkeys(PLACES, 0.0)
    predicted = [*spans[1:], (len(text), len(text))]
    for term, (start, stop) in zip(terms.tolist(), predicted, strict=True):
        if stop <= colon + 1:
            sums["heading"] += term
        elif start < last and stop > first:
            sums["answer"] += term
        else:
            sums["else"] += term
    return sums


def summary(score: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means of a group of questions."""
    means = {place: sum(row[place] for row in rows) / len(rows) for place in PLACES}
    below = sum(row["heading"] < 0 for row in rows)
    mean = sum(row["score"] for row in rows) / len(rows)
    return {"gold's score": score, "questions": len(rows), "mean": mean} | means | {"heading below 0": below}


if __name__ == "__main__":
    sys.exit(main())
