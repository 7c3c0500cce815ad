"""Rows of the passages and the questions by many sketches and corrections, from one pass of the model over each text.

Forward and backward passes cost most of it: a dozen settings take about twice the time of one.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import trackstar
from trackstar.gradients.collector import GradientCollector
from trackstar.gradients.examples import Encoded, encode_examples, encode_queries
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.passes import BATCH_TOKENS
from trackstar.progress import track

from experiments import corpus
from experiments.provenance import checkpoint, load_model, optimizer_file, questions
from experiments.stores import EXACT, folder
from experiments.study import Study

Rows = tuple[torch.Tensor, torch.Tensor]
"""Of the passages (N, L, d) and of the questions (Q, L, d), float32, not whitened, mapped into memory."""


@dataclasses.dataclass(frozen=True)
class Sketched:
    """What rows are made by.

    Attributes:
        correction: (kind, rank) of the last epoch's second moments, or None.
        spec: of the sketch; all that are collected together capture the same modules.
    """

    correction: tuple[str, int] | None = EXACT
    spec: trackstar.SketchSpec = dataclasses.field(default_factory=trackstar.SketchSpec)


def sketched(study: Study, settings: Sequence[Sketched], *, epoch: int | None = None) -> list[Rows]:
    """The rows by each of the settings: those that are not kept are collected together, and kept.

    Args:
        study: whose passages and questions they are of.
        settings: in whose order the rows are returned.
        epoch: of the model, None for the last.
    """
    files = [_files(study, setting, epoch) for setting in settings]
    missing = [i for i, pair in enumerate(files) if not all(file.exists() for file in pair)]
    if missing:
        _collect(study, [settings[i] for i in missing], [files[i] for i in missing], epoch)
    return [(_mapped(passages), _mapped(asked)) for passages, asked in files]


def _files(study: Study, setting: Sketched, epoch: int | None) -> tuple[Path, Path]:
    name = folder(study, epoch=epoch, correction=setting.correction, spec=setting.spec).name
    return study.path("rows", f"{name}-passages.npy"), study.path("rows", f"{name}-questions.npy")


def _mapped(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(file, mmap_mode="c"))


def _collect(
    study: Study, settings: Sequence[Sketched], files: Sequence[tuple[Path, Path]], epoch: int | None
) -> None:
    model, tokenizer = load_model(checkpoint(study, epoch))
    moments = trackstar.SecondMoments.from_optimizer(optimizer_file(study), model)
    forms = {setting.correction for setting in settings} - {None}
    corrections = {form: moments.correction(form[0], rank=form[1]) for form in forms}
    collectors = [
        GradientCollector(model, setting.spec, corrections.get(setting.correction)) for setting in settings
    ]
    lean = LeanPass(model, collectors[0].modules.values())
    passages, _ = corpus.load(study)
    texts = encode_examples(passages, tokenizer), encode_queries(questions(study), tokenizer)
    for examples, of_these in zip(texts, zip(*files, strict=True), strict=True):
        _write(lean, examples, collectors, of_these)


def _write(
    lean: LeanPass,
    examples: Sequence[Encoded],
    collectors: Sequence[GradientCollector],
    files: Sequence[Path],
) -> None:
    """One file of rows for each collector."""
    unfinished = [file.with_name(f"{file.name}.new") for file in files]
    tables = [
        np.lib.format.open_memmap(file, "w+", np.float32, (len(examples), *collector.row_shape))
        for file, collector in zip(unfinished, collectors, strict=True)
    ]
    with lean, track("sketching", len(examples)) as advance:
        for members in lean.batches([len(example) for example in examples], BATCH_TOKENS):
            batch = lean.arrange([examples[i] for i in members])
            with contextlib.ExitStack() as inside:
                for collector in collectors:
                    collector.offsets, collector.shape = batch.offsets, batch.shape
                    inside.enter_context(collector)
                lean.run(batch)
            for table, collector in zip(tables, collectors, strict=True):
                table[members] = collector.rows.numpy()
            advance(len(members))
    for table, made, file in zip(tables, unfinished, files, strict=True):
        table.flush()
        made.replace(file)
