"""Every method's scores of the small model's passages for its questions."""

from pathlib import Path

import numpy as np
import torch
import trackstar
from trackstar.ekfac import fit_factors
from trackstar.ekfac.capture import TokenCapture
from trackstar.ekfac.inverse import DampedInverse
from trackstar.ekfac.scoring import scores_of, thin_queries
from trackstar.scoring.baselines import bm25_scores

from experiments.scores import automatic_mixing, scores
from experiments.small_model import WIDTH, Setup, Texts, train

DAMPING = 0.1
"""Of EK-FAC, relative to the mean eigenvalue: the engine's default."""


def small_scores(folder: Path, texts: Texts, setup: Setup, seed: int) -> dict[str, torch.Tensor]:
    """(Q, N) scores by each method, the model trained on all passages with ``seed``; "random" are drawn.

    EK-FAC keeps its factors in ``folder``.
    """
    passages, queries = texts.encoded(), texts.encoded_queries()
    model, optimizer = train(passages, range(len(passages)), seed, setup)
    exact = trackstar.SecondMoments.from_optimizer(optimizer.state_dict(), model).correction("exact")
    plain, corrected = (
        [
            torch.cat(list(trackstar.collect_rows(model, given, correction=correction)))
            for given in (texts.passages, texts.queries)
        ]
        for correction in (None, exact)
    )
    words = [texts.tokenizer.decode(query["input_ids"]) for query in texts.queries]
    factors = fit_factors(folder, model, texts.passages, seed=seed)
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
        "EK-FAC": scores_of(capture, passages, thin, lambda count: None).float(),
        "BM25": bm25_scores(words, [passage["text"] for passage in texts.passages]),
        "random": torch.from_numpy(np.random.default_rng(seed).random((len(queries), len(passages)))).float(),
    }
