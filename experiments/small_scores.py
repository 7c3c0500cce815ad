"""Every method's scores of the small model's passages for its questions."""

import numpy as np
import torch
import trackstar
from trackstar.ekfac import fit_factors
from trackstar.ekfac.capture import TokenCapture
from trackstar.ekfac.inverse import DampedInverse
from trackstar.ekfac.scoring import scores_of, thin_queries
from trackstar.gradients.lean import LeanPass
from trackstar.scoring.baselines import bm25_scores
from trackstar.scoring.probability import mean_probabilities

from experiments.scores import automatic_mixing, scores
from experiments.small_model import WIDTH, Setup, Texts, train
from experiments.study import Study

DAMPING = 0.1
"""Of EK-FAC, relative to the mean eigenvalue: the engine's default."""


def small_scores(here: Study, texts: Texts, setup: Setup) -> dict[str, torch.Tensor]:
    """(Q, N) scores by each method, kept; the model is trained on all passages with the study's seed."""
    kept = here.path("small-scores.pt")
    if not kept.is_file():
        torch.save(_scores(here, texts, setup), kept)
    return torch.load(kept)


def _scores(here: Study, texts: Texts, setup: Setup) -> dict[str, torch.Tensor]:
    passages, queries = texts.encoded(), texts.encoded_queries()
    model, optimizer = train(passages, range(len(passages)), here.seed, setup)
    exact = trackstar.SecondMoments.from_optimizer(optimizer.state_dict(), model).correction("exact")
    plain, corrected, margin = (
        [
            torch.cat(list(trackstar.collect_rows(model, given, correction=correction, output=output)))
            for given in (texts.passages, texts.queries)
        ]
        for correction, output in ((None, "loss"), (exact, "loss"), (None, "margin"))
    )
    unlearned = 1 - mean_probabilities(LeanPass(model, ()), passages)
    words = [texts.tokenizer.decode(query["input_ids"]) for query in texts.queries]
    factors = fit_factors(here.path("small-ekfac"), model, texts.passages, seed=here.seed)
    capture = TokenCapture(model, list(factors.shapes))
    thin = thin_queries(capture, queries, DampedInverse(factors, DAMPING, torch.device("cpu")), WIDTH, "loss")
    return {
        "TrackStar": scores(*corrected, mixing=automatic_mixing(*corrected)),
        "V, R, norm": scores(*corrected),
        "R, norm": scores(*plain),
        "V, norm": scores(*corrected, whitened=False),
        "cosine": scores(*plain, whitened=False),
        "dot": scores(*plain, whitened=False, unit_norm=False),
        "R, no norm": scores(*plain, unit_norm=False),
        "V, R, no norm": scores(*corrected, unit_norm=False),
        "TRAK": scores(*margin, unit_norm=False) * unlearned,
        "EK-FAC": scores_of(capture, passages, thin, lambda count: None).float(),
        "BM25": bm25_scores(words, [passage["text"] for passage in texts.passages]),
        "random": torch.from_numpy(
            np.random.default_rng(here.seed).random((len(queries), len(passages)))
        ).float(),
    }
