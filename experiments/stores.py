"""Stores of the corpus by the fine-tuned model, one for each setting, built when first asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trackstar
from trackstar.gradients.examples import encode_queries
from trackstar.scoring.attribution import query_rows

from experiments import corpus
from experiments.provenance import checkpoint, load_model, optimizer_file
from experiments.study import Study, cached

EXACT = ("exact", 1)


def folder(
    study: Study,
    *,
    epoch: int | None = None,
    correction: tuple[str, int] | None = EXACT,
    spec: trackstar.SketchSpec | None = None,
    output: str = "loss",
) -> Path:
    """Where the store of these settings lies."""
    spec = spec or trackstar.SketchSpec()
    epoch = study.size.epochs if epoch is None else epoch
    form = (
        "none"
        if correction is None
        else correction[0] + (str(correction[1]) if correction[0] == "rank" else "")
    )
    parts = [f"epoch{epoch}", form, spec.kind, f"{spec.sketch}", f"{spec.blocks}"]
    parts += [f"seed{spec.seed}"] if spec.seed else []
    parts += [output] if output != "loss" else []
    return study.path("stores", "-".join(parts))


def built(
    study: Study,
    *,
    epoch: int | None = None,
    correction: tuple[str, int] | None = EXACT,
    spec: trackstar.SketchSpec | None = None,
    output: str = "loss",
) -> trackstar.Store:
    """The store of these settings, in float32: opened if it is whole, else built, or finished.

    Args:
        study: whose passages it holds.
        epoch: of the model, None for the last.
        correction: (kind, rank) of the last epoch's second moments, or None.
        spec: of the sketch.
        output: what a passage's row is the gradient of.
    """
    path = folder(study, epoch=epoch, correction=correction, spec=spec, output=output)
    try:
        store = trackstar.open_store(path)
        if store.complete:
            return store
    except FileNotFoundError:
        pass
    model, tokenizer = load_model(checkpoint(study, epoch))
    form = None
    if correction is not None:
        moments = trackstar.SecondMoments.from_optimizer(optimizer_file(study), model)
        form = moments.correction(correction[0], rank=correction[1])
    passages, _ = corpus.load(study)
    return trackstar.build_store(
        path,
        model,
        passages,
        tokenizer=tokenizer,
        spec=spec,
        correction=form,
        output=output,
        dtype="float32",
    )


def passage_rows(store: trackstar.Store) -> torch.Tensor:
    """The rows (N, L, d) float32 as they were before whitening: x = R B y, since Bᵀ B = R⁻¹ and B is symmetric."""
    unwhitener = (store.curvature.train @ store.curvature.whitener.double()).float()
    rows = torch.empty(len(store), *store.squared_norms.shape[1:], unwhitener.shape[1])
    for start in range(0, len(store), 128):
        part = store.rows(start, min(start + 128, len(store)))
        torch.matmul(part.transpose(0, 1), unwhitener.mT, out=rows[start : start + len(part)].transpose(0, 1))
    return rows


def question_rows(
    study: Study,
    store: trackstar.Store,
    questions: Sequence[dict[str, Any]],
    *,
    epoch: int | None = None,
    output: str = "loss",
) -> torch.Tensor:
    """The questions' rows (Q, L, d) float32, not whitened."""

    def make() -> torch.Tensor:
        model, tokenizer = load_model(checkpoint(study, epoch))
        return query_rows(
            store, model, encode_queries(questions, tokenizer), tokenizer=tokenizer, output=output
        )

    return cached(study.path("questions", f"{store.path.name}-{output}.pt"), make)
