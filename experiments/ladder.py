"""Tables 1 and 2 of the paper: every method, from BM25 to TrackStar, on the same questions and passages."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch
from trackstar.ekfac import fit_factors
from trackstar.ekfac.capture import TokenCapture
from trackstar.ekfac.inverse import DampedInverse
from trackstar.ekfac.scoring import scores_of, thin_queries
from trackstar.examples import encode_examples, encode_queries

from experiments import corpus, retrieval
from experiments.provenance import checkpoint, load_model, questions
from experiments.quality import difference, measured
from experiments.scores import automatic_mixing, ranking, scores
from experiments.stores import built, passage_rows, question_rows
from experiments.study import Study, cached, study

RANK = 32
"""Of the queries' thin matrices in EK-FAC: the engine's default."""

DAMPING = 0.1
"""Of EK-FAC, relative to the mean eigenvalue: the engine's default."""

TRACKSTAR = "TrackStar"


def main(argv: list[str] | None = None) -> int:
    """Score every passage for every question by every method."""
    here = study(__doc__, argv)
    passages, _ = corpus.load(here)
    asked = questions(here)
    found, mixing = gradient_scores(here, asked)
    found |= retrieval_scores(passages, asked)
    found["EK-FAC"] = cached(here.path("scores", "ekfac.pt"), lambda: ekfac_scores(here, passages, asked))
    ids = [passage["id"] for passage in passages]
    rankings = {name: ranking(values, ids) for name, values in found.items()}
    results = {
        "questions": len(asked),
        "passages": len(passages),
        "λ": mixing,
        "quality": measured(rankings, asked),
        "MRR less than TrackStar's": {
            name: dataclasses.asdict(difference(rankings[TRACKSTAR], ranked, asked))
            for name, ranked in rankings.items()
            if name != TRACKSTAR
        },
    }
    here.write("ladder", results)
    return 0


def gradient_scores(here: Study, asked: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], float]:
    """Scores (Q, N) of the methods that compare rows, and λ."""
    rows = {}
    for name, correction in (("plain", None), ("corrected", ("exact", 1))):
        store = built(here, correction=correction)
        rows[name] = passage_rows(store), question_rows(here, store, asked)
    plain, corrected = rows["plain"], rows["corrected"]
    mixing = automatic_mixing(*corrected)
    found = {
        "dot": scores(*plain, whitened=False, unit_norm=False),
        "cosine": scores(*plain, whitened=False),
        "V, norm": scores(*corrected, whitened=False),
        "R, norm": scores(*plain),
        "V, R, norm": scores(*corrected),
        TRACKSTAR: scores(*corrected, mixing=mixing),
        "R, no norm (LoGra)": scores(*plain, unit_norm=False),
    }
    return found, mixing


def retrieval_scores(
    passages: list[Mapping[str, str]], asked: list[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """Scores (Q, N) of what looks at words and sentences alone."""
    texts = [passage["text"] for passage in passages]
    sentences = [question["prompt"] + question["target"] for question in asked]
    return {"BM25": retrieval.bm25(texts, sentences), "embeddings": retrieval.dense(texts, sentences)}


def ekfac_scores(here: Study, passages: list[Mapping[str, str]], asked: list[dict[str, Any]]) -> torch.Tensor:
    """Influence (Q, N) by EK-FAC on the size's modules, the queries' gradients of rank ``RANK``.

    ``trackstar.ekfac.influence`` scores the best anew at full rank, which for all pairs would take hours.
    """
    model, tokenizer = load_model(checkpoint(here))
    factors = fit_factors(
        here.path("ekfac"), model, passages, tokenizer=tokenizer, modules=list(here.size.ekfac)
    )
    capture = TokenCapture(model, list(factors.shapes))
    inverse = DampedInverse(factors, DAMPING, torch.device("cpu"))
    thin = thin_queries(capture, encode_queries(asked, tokenizer), inverse, RANK, "loss")
    return scores_of(capture, encode_examples(passages, tokenizer), thin, lambda count: None).float()


if __name__ == "__main__":
    sys.exit(main())
