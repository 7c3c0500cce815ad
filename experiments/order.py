"""Does influence fall when the parts of a key phrase change places? (Grosse et al., arXiv 2308.03296, section 5.3.4)

Each fact is put in two texts. The sentence: the question with its answer ("in order"), the same with the answer before
the subject ("flipped"), and the question alone ("without the answer"). The passage that the model was trained on: as it
is, with its halves in the other order, and without the answer's words. Every text is scored for the question by
TrackStar and by EK-FAC, as if it stood in the corpus; and a training step is taken on it, which shows what it does.

In results/order.json: ``ratios``, for each text, form and measure the mean over questions and its ratio to that of the
text in order; ``examples``, some questions' texts with what was measured of them.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import trackstar
from trackstar.curvature import choose_mixing
from trackstar.evaluation.metrics import LEVEL, RESAMPLES, Estimate, estimate
from trackstar.evaluation.tail_patch import tail_patch

from experiments import corpus
from experiments.corpus import Fact
from experiments.ladder import TRACKSTAR, influence
from experiments.provenance import checkpoint, load_model, optimizer_file, questions
from experiments.scores import scores
from experiments.stores import built, passage_rows, question_rows
from experiments.study import Study, study
from experiments.tail_patch import CLIP, drawn

FLIPPED = {
    "adjective": "The adjective {object} describes a person from {subject}",
    "anthem": "{object} is the national anthem of {subject}",
    "capital": "{object} is the capital of {subject}",
    "currency": "The {object} are the currency of {subject}",
    "kind of place or thing": "A {object} has the name of {subject}",
    "nationality of a person": "{object} was the nationality of {subject}",
    "occupation": "A {object} by occupation was {subject}",
    "part of": "{object} is where {subject} is located",
    "year of birth": "In the year {object} was born {subject}",
}
"""Each relation's question and answer, with the answer before the subject."""

TEXTS = ("sentence", "passage")

FORMS = ("in order", "flipped", "without the answer")

QUESTIONS = {"small": 12, "medium": 30, "full": 60}
"""By the size of the study, of those whose passages can be put so."""

EXAMPLES = 5

Question = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Score every form of the texts for its question, and step on it."""
    here = study(__doc__, argv)
    passages, facts = corpus.load(here)
    texts = {passage["id"]: passage["text"] for passage in passages}
    fact_of = {fact.id: fact for fact in facts}
    put = []
    for question in questions(here):
        fact = fact_of[question["id"]]
        halves = passage_forms(fact, texts[fact.relation_gold[0]])
        if fact.relation in FLIPPED and halves is not None:
            put.append((question, [*sentence_forms(fact), *halves]))
    if not put:
        print(
            "order: no question's passage is a subject's name and what is said of it, of a relation known here"
        )
        return 0
    put = [put[i] for i in drawn(here, len(put), QUESTIONS[here.name])]
    asked, forms = [question for question, _ in put], [row for _, row in put]
    measured = {
        TRACKSTAR: by_trackstar(here, asked, forms),
        "EK-FAC": by_ekfac(here, asked, forms),
        "change of log p by a step": by_steps(here, asked, forms),
    }
    columns = [(text, form) for text in TEXTS for form in FORMS]
    ratios = [
        {"measure": measure, "text": text, "form": form}
        | {"mean": dataclasses.asdict(estimate(values[:, c]))}
        | {"ratio": dataclasses.asdict(ratio(values[:, c], values[:, columns.index((text, FORMS[0]))]))}
        for measure, values in measured.items()
        for c, (text, form) in enumerate(columns)
    ]
    examples = [
        {"question": asked[q]["prompt"] + asked[q]["target"], "text": forms[q][c]}
        | {measure: values[q, c] for measure, values in measured.items()}
        for q in range(min(EXAMPLES, len(asked)))
        for c in range(len(columns))
    ]
    here.write("order", {"questions": len(asked), "ratios": ratios, "examples": examples}, clip=CLIP)
    return 0


def sentence_forms(fact: Fact) -> list[str]:
    """A sentence that states the fact, in the order of ``FORMS``."""
    flipped = FLIPPED[fact.relation].format(subject=fact.subject, object=fact.object)
    return [fact.prompt + fact.target, flipped, fact.prompt]


def passage_forms(fact: Fact, text: str) -> list[str] | None:
    """The passage in the order of ``FORMS``; None where it does not state subject and then object.

    A passage is the subject's name, a colon or dash, and what is said of it.
    """
    for separator in (" - ", ": "):
        name, found, said = text.partition(separator)
        if found and name == fact.subject and fact.object in said:
            without = re.sub(rf"\s*\b{re.escape(fact.object)}\b", "", said)
            return [text, said + separator + name, name + separator + without.strip()]
    return None


def by_trackstar(here: Study, asked: Sequence[Question], forms: Sequence[Sequence[str]]) -> np.ndarray:
    """(Q, F) of each question's forms, with R of the corpus and λ and R_eval of all questions."""
    every = questions(here)
    store = built(here)
    rows = question_rows(here, store, every)
    model, tokenizer = load_model(checkpoint(here))
    flat = [{"text": text} for row in forms for text in row]
    found = trackstar.collect_rows(
        model, flat, tokenizer=tokenizer, spec=store.spec, correction=store.correction
    )
    mixing = choose_mixing(rows, store.curvature.eigenvalues)
    values = scores(torch.cat(list(found)), rows, mixing=mixing, trained=passage_rows(store))
    positions = {question["id"]: q for q, question in enumerate(every)}
    return own(values[[positions[question["id"]] for question in asked]])


def by_ekfac(here: Study, asked: Sequence[Question], forms: Sequence[Sequence[str]]) -> np.ndarray:
    """(Q, F) influence of each question's forms."""
    return own(influence(here, asked, [{"text": text} for row in forms for text in row]))


def own(values: torch.Tensor) -> np.ndarray:
    """(Q, F) of each question's own F texts, from (Q, Q·F) of all."""
    return values.unflatten(1, (len(values), -1)).diagonal().T.double().numpy()


def by_steps(here: Study, asked: Sequence[Question], forms: Sequence[Sequence[str]]) -> np.ndarray:
    """(Q, F) log p of each answer after a step on each form, less log p after a step on nothing."""
    model, tokenizer = load_model(checkpoint(here))
    patch = tail_patch(
        model,
        optimizer_file(here),
        asked,
        [[{"text": text} for text in row] for row in forms],
        tokenizer=tokenizer,
        clip=CLIP,
        processes=os.cpu_count() or 1,
        keep=here.path("order.jsonl"),
    )
    return (patch.after - patch.idle[:, None]).numpy()


def ratio(values: np.ndarray, reference: np.ndarray) -> Estimate:
    """Mean of values (n,) over mean of reference (n,), with the percentile bootstrap's interval of it."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    drawn_ratios = values[drawn].mean(1) / reference[drawn].mean(1)
    low, high = np.quantile(drawn_ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean() / reference.mean()), float(low), float(high))


if __name__ == "__main__":
    sys.exit(main())
