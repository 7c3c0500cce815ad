"""One setting at a time: what each choice is worth, in MRR on relation gold.

Names given after the options run these sweeps alone; the default is all that the size does not leave out.
"""

import dataclasses
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
import trackstar
from trackstar.curvature import DAMPING
from trackstar.scoring.attribution import score_rows

from experiments.provenance import questions
from experiments.quality import Ranking, difference, measured, mrr
from experiments.scores import automatic_mixing, ranking, scores
from experiments.sketches import Sketched, sketched
from experiments.stores import built, passage_rows, question_rows
from experiments.study import Study, chosen, parser

Found = tuple[Ranking, dict[str, Any]]
"""The passages that a setting ranks for each question, and what else there is to say of it."""

Setting = tuple[str, Ranking, dict[str, Any]]
"""Its name before that."""


class Rows:
    """The default store's rows and the questions', which most sweeps take up."""

    def __init__(self, here: Study) -> None:
        self.here = here
        self.asked = questions(here)
        self.store = built(here)
        self.passages = passage_rows(self.store)
        self.questions = question_rows(here, self.store, self.asked)
        self.mixing = automatic_mixing(self.passages, self.questions)
        self.ids = [self.store.id(i) for i in range(len(self.store))]

    def ranked(self, passages: torch.Tensor, questions: torch.Tensor, **settings: Any) -> Found:
        """By TrackStar from these rows, λ by the paper's rule unless it is given."""
        if "mixing" not in settings:
            settings["mixing"] = automatic_mixing(passages, questions, settings.get("damping", DAMPING))
        _, blocks, size = passages.shape
        said = {"λ": settings["mixing"], "D": blocks * size}
        return ranking(scores(passages, questions, **settings), self.ids), said

    @cached_property
    def default(self) -> Found:
        """By the default settings."""
        return self.ranked(self.passages, self.questions)

    def by(self, sweep: str) -> Iterator[Setting]:
        """By the rows that a sweep has of its own."""
        for name, found in zip(OWN[sweep], sketched(self.here, list(OWN[sweep].values())), strict=True):
            yield name, *self.ranked(*found)


def mixing(rows: Rows) -> Iterator[Setting]:
    """λ, the share of the questions' own curvature in R."""
    for value in (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99):
        yield f"{value}", *rows.ranked(rows.passages, rows.questions, mixing=value)
    yield f"auto ({rows.mixing:.3f})", *rows.ranked(rows.passages, rows.questions)


def damping(rows: Rows) -> Iterator[Setting]:
    """δ relative to the mean eigenvalue of R_train."""
    for value in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
        yield f"{value}", *rows.ranked(rows.passages, rows.questions, damping=value)


def sketch(rows: Rows) -> Iterator[Setting]:
    """Size p = q of each module's sketch (Figure 2): corners of the largest, which are sketches themselves."""
    (largest,) = OWN["sketch"].values()
    (found,) = sketched(rows.here, [largest])
    size = largest.spec.sketch
    for p in (1, 2, 4, 8, 12, 16, 24, size):
        corners = [part.unflatten(2, (size, size))[:, :, :p, :p].flatten(2) * (size / p) for part in found]
        yield f"{p}", *rows.ranked(*corners)


def blocks(rows: Rows) -> Iterator[Setting]:
    """Layer blocks: modules' sketches of 16 added within them, so that D falls with their number."""
    count = rows.passages.shape[1]
    for wanted in (1, 4, 15, 30, 105, count):
        # Contiguous and of one size, as 1, 4, … divide into the modules of SmolLM2 or nearly.
        groups = torch.arange(count) * wanted // count
        merged = [
            torch.zeros(len(part), wanted, part.shape[2]).index_add_(1, groups, part)
            for part in (rows.passages, rows.questions)
        ]
        yield f"{wanted}", *rows.ranked(*merged)


def output(rows: Rows) -> Iterator[Setting]:
    """What a question's row is the gradient of (Table A.3); passages keep the loss."""
    for name in ("loss", "margin", "logit"):
        asked = question_rows(rows.here, rows.store, rows.asked, output=name)
        yield name, *rows.ranked(rows.passages, asked)


def dtype(rows: Rows) -> Iterator[Setting]:
    """Dtype of the stored rows, by the engine, against its own scores from float32."""
    wide = _engine_scores(rows, rows.store)
    for name in ("float32", "float16", "int8", "int4", "sign"):
        store = rows.store
        if name != "float32":
            path = rows.here.path("stores", f"{store.path.name}-{name}")
            store = (
                trackstar.open_store(path)
                if path.exists()
                else trackstar.reencode_store(store.path, path, name)
            )
        found = _engine_scores(rows, store)
        yield name, ranking(found, rows.ids), _agreement(found, wide)


def correction(rows: Rows) -> Iterator[Setting]:
    """Form of the optimizer correction, from the real second moments of AdamW."""
    yield from rows.by("correction")
    yield "exact", *rows.default


def kind(rows: Rows) -> Iterator[Setting]:
    """Random matrices of the sketch, two draws of each: how far those of one kind differ shows the noise."""
    yield "Rademacher", *rows.default
    yield from rows.by("kind")


def equal_size(rows: Rows) -> Iterator[Setting]:
    """Many small blocks or few large ones at nearly equal D."""
    yield "module × 16²", *rows.default
    yield from rows.by("equal_size")


def checkpoint(rows: Rows) -> Iterator[Setting]:
    """The model along the fine-tuning, with the last epoch's second moments throughout."""
    last = rows.here.size.epochs
    for epoch in (epoch for epoch in CHECKPOINTS if epoch < last):
        (found,) = sketched(rows.here, [Sketched()], epoch=epoch)
        yield f"epoch {epoch}", *rows.ranked(*found)
    yield f"epoch {last}", *rows.default


CHECKPOINTS = (0, 1)
"""Epochs whose models stand beside that of the last; 0 is the model before training."""

OWN = {
    "sketch": {"32": Sketched(spec=trackstar.SketchSpec(sketch=32))},
    "correction": {
        "none": Sketched(correction=None),
        **{f"rank {rank}": Sketched(correction=("rank", rank)) for rank in (1, 2, 4, 8)},
    },
    "kind": {
        "Rademacher, seed 1": Sketched(spec=trackstar.SketchSpec(seed=1)),
        "CountSketch": Sketched(spec=trackstar.SketchSpec(kind="countsketch")),
        "CountSketch, seed 1": Sketched(spec=trackstar.SketchSpec(kind="countsketch", seed=1)),
    },
    "equal_size": {
        "60 × 30²": Sketched(spec=trackstar.SketchSpec(sketch=30, blocks=60)),
        "16 × 58²": Sketched(spec=trackstar.SketchSpec(sketch=58, blocks=16)),
    },
}
"""Settings of the sweeps that need rows of their own, by name: one pass of the model collects them all."""

SWEEPS = {
    "mixing": mixing,
    "damping": damping,
    "sketch": sketch,
    "correction": correction,
    "blocks": blocks,
    "equal_size": equal_size,
    "kind": kind,
    "output": output,
    "checkpoint": checkpoint,
    "dtype": dtype,
}


def main(argv: list[str] | None = None) -> int:
    """Run the sweeps that are named."""
    options = parser(__doc__)
    options.add_argument("sweeps", nargs="*", metavar="SWEEP", help=", ".join(SWEEPS))
    given = options.parse_args(argv)
    unknown = set(given.sweeps) - SWEEPS.keys()
    if unknown:
        options.error(f"no sweep is called {', '.join(sorted(unknown))}")
    here = chosen(given)
    names = given.sweeps or [name for name in SWEEPS if name not in here.size.left_out]
    rows = Rows(here)
    sketched(here, [setting for name in names for setting in OWN.get(name, {}).values()])
    for name in names:
        run(rows, name)
    return 0


def run(rows: Rows, name: str) -> None:
    """Run a sweep and write its JSON: every setting's figures, and how they differ from the default's."""
    reference, _ = rows.default
    settings = []
    for setting, found, said in SWEEPS[name](rows):
        quality = {row["gold"]: row for row in measured({setting: found}, rows.asked, by=())}
        less = difference(found, reference, rows.asked)
        settings.append(
            {
                "setting": setting,
                "mrr": quality["relation"]["mrr"],
                "recall": quality["relation"]["recall"],
                "lexical mrr": quality["lexical"]["mrr"],
                "above the default": dataclasses.asdict(less),
            }
            | said
        )
        print(f"{name} {setting}: MRR {quality['relation']['mrr']['value']:.3f}", flush=True)
    rows.here.write(f"sweep-{name}", {"default": mrr(reference, rows.asked), "settings": settings})


def _engine_scores(rows: Rows, store: trackstar.Store) -> torch.Tensor:
    """The engine's own scores (Q, N) of the whole store."""
    values, indices, _ = score_rows(store, rows.questions, k=len(store), mixing=rows.mixing)
    return torch.empty_like(values).scatter_(1, indices, values)


def _agreement(found: torch.Tensor, wide: torch.Tensor) -> dict[str, float]:
    """Pearson's correlation with the scores from float32, and how many of their top 10 are among the top 10."""
    pearson = [
        np.corrcoef(mine, theirs)[0, 1] for mine, theirs in zip(found.numpy(), wide.numpy(), strict=True)
    ]
    top = [
        len(set(mine) & set(theirs)) / 10
        for mine, theirs in zip(found.topk(10).indices.tolist(), wide.topk(10).indices.tolist(), strict=True)
    ]
    return {"Pearson": float(np.mean(pearson)), "top-10 overlap": float(np.mean(top))}


if __name__ == "__main__":
    sys.exit(main())
