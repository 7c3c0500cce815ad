"""One setting at a time: what each choice is worth, in MRR on relation gold.

Names given after the options run these sweeps alone; the default is all that need no rows of their own, and in larger
sizes all.
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import trackstar
from trackstar.curvature import DAMPING
from trackstar.scoring.attribution import score_rows

from experiments.provenance import questions
from experiments.quality import Ranking, difference, measured
from experiments.scores import automatic_mixing, ranking, scores
from experiments.stores import EXACT, built, passage_rows, question_rows
from experiments.study import Study, chosen, parser

Setting = tuple[str, Ranking, dict[str, Any]]
"""Its name, the passages it ranks for each question, and what else there is to say of it."""


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

    def ranked(self, passages: torch.Tensor, questions: torch.Tensor, **settings: Any) -> Setting:
        """By TrackStar from these rows, λ by the paper's rule unless it is given."""
        if "mixing" not in settings:
            settings["mixing"] = automatic_mixing(passages, questions, settings.get("damping", DAMPING))
        _, blocks, size = passages.shape
        said = {"λ": settings["mixing"], "D": blocks * size}
        return "", ranking(scores(passages, questions, **settings), self.ids), said

    def of_store(self, **settings: Any) -> Setting:
        """The same from the rows of another store."""
        store = built(self.here, **settings)
        asked = question_rows(self.here, store, self.asked, epoch=settings.get("epoch"))
        return self.ranked(passage_rows(store), asked)


def mixing(rows: Rows) -> Iterator[Setting]:
    """λ, the share of the questions' own curvature in R."""
    for value in (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99):
        yield f"{value}", *rows.ranked(rows.passages, rows.questions, mixing=value)[1:]
    yield f"auto ({rows.mixing:.3f})", *rows.ranked(rows.passages, rows.questions)[1:]


def damping(rows: Rows) -> Iterator[Setting]:
    """δ relative to the mean eigenvalue of R_train."""
    for value in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
        yield f"{value}", *rows.ranked(rows.passages, rows.questions, damping=value)[1:]


def sketch(rows: Rows) -> Iterator[Setting]:
    """Size p = q of each module's sketch (Figure 2): corners of the sketches of 16, which are sketches themselves."""
    size = rows.store.spec.sketch
    for p in (1, 2, 4, 8, 12, size):
        corners = [
            part.unflatten(2, (size, size))[:, :, :p, :p].flatten(2) * (size / p)
            for part in (rows.passages, rows.questions)
        ]
        yield f"{p}", *rows.ranked(*corners)[1:]


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
        yield f"{wanted}", *rows.ranked(*merged)[1:]


def output(rows: Rows) -> Iterator[Setting]:
    """What a question's row is the gradient of (Table A.3); passages keep the loss."""
    for name in ("loss", "margin", "logit"):
        asked = question_rows(rows.here, rows.store, rows.asked, output=name)
        yield name, *rows.ranked(rows.passages, asked)[1:]


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
    for form in (None, *(("rank", rank) for rank in rows.here.size.ranks), EXACT):
        name = "none" if form is None else f"rank {form[1]}" if form[0] == "rank" else "exact"
        yield name, *rows.of_store(correction=form)[1:]


def kind(rows: Rows) -> Iterator[Setting]:
    """Random matrices of the sketch, and another draw of the default, which shows the noise."""
    for name, spec in (
        ("Rademacher", trackstar.SketchSpec()),
        ("Rademacher, another seed", trackstar.SketchSpec(seed=1)),
        ("CountSketch", trackstar.SketchSpec(kind="countsketch")),
    ):
        yield name, *rows.of_store(spec=spec)[1:]


def equal_size(rows: Rows) -> Iterator[Setting]:
    """Many small blocks or few large ones at nearly equal D."""
    for layers, p in (("module", 16), (60, 30), (16, 58)):
        spec = trackstar.SketchSpec(sketch=p, blocks=layers)
        yield f"{layers} × {p}²", *rows.of_store(spec=spec)[1:]


def checkpoint(rows: Rows) -> Iterator[Setting]:
    """The model along the fine-tuning, with the last epoch's second moments throughout."""
    for epoch in rows.here.size.checkpoints:
        yield f"epoch {epoch}", *rows.of_store(epoch=epoch)[1:]


FROM_ROWS = {
    "mixing": mixing,
    "damping": damping,
    "sketch": sketch,
    "blocks": blocks,
    "output": output,
    "dtype": dtype,
}
"""Sweeps over what is done with the default store's rows."""

FROM_STORES = {"correction": correction, "kind": kind, "equal_size": equal_size, "checkpoint": checkpoint}
"""Sweeps that need a store for each setting."""

SWEEPS = FROM_ROWS | FROM_STORES


def main(argv: list[str] | None = None) -> int:
    """Run the sweeps that are named."""
    options = parser(__doc__)
    options.add_argument("sweeps", nargs="*", metavar="SWEEP", help=", ".join(SWEEPS))
    given = options.parse_args(argv)
    unknown = set(given.sweeps) - SWEEPS.keys()
    if unknown:
        options.error(f"no sweep is called {', '.join(sorted(unknown))}")
    here = chosen(given)
    rows = Rows(here)
    for name in given.sweeps or (SWEEPS if here.size.sweeps else FROM_ROWS):
        run(rows, name)
    return 0


def run(rows: Rows, name: str) -> None:
    """Run a sweep and write its JSON: every setting's figures, and how they differ from the default's."""
    reference = rows.ranked(rows.passages, rows.questions)[1]
    results = []
    for setting, found, said in SWEEPS[name](rows):
        quality = {row["gold"]: row for row in measured({setting: found}, rows.asked, by=())}
        less = difference(found, reference, rows.asked)
        results.append(
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
    rows.here.write(f"sweep-{name}", results, sweep=(SWEEPS[name].__doc__ or "").strip())


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
