"""True provenance: fine-tune SmolLM2 on the corpus, and keep as questions only facts that this made likelier.

Our own AdamW loop: after each epoch the model, as transformers saves it, and the optimizer's state, as torch does, so
that V is what training really used. An interrupted run goes on after its last whole epoch.
"""

import json
import math
import random
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional
from trackstar.gradients.examples import IGNORED, length_batches

from examples.assets import SMOLLM2, converted, unpacked
from experiments import corpus
from experiments.corpus import Fact, Passage
from experiments.study import Study, study, write_whole

WARMUP = 20
"""Steps in which the learning rate rises from 0."""

BETAS = (0.9, 0.99)

SORTED_TOGETHER = 16
"""Batches whose passages are drawn at a time and put together by length, so that little is padding."""

TOKENS = 512
"""Of the questions that are measured at a time."""

OPTIMIZER = "optimizer.pt"

LOSS = "training_loss.json"


def checkpoint(study: Study, epoch: int | None = None) -> Path:
    """The folder of the model after ``epoch`` epochs: 0 is the model as it was, None the last."""
    epoch = study.size.epochs if epoch is None else epoch
    return converted(unpacked(SMOLLM2)) if epoch == 0 else study.folder / "checkpoints" / f"epoch-{epoch}"


def optimizer_file(study: Study) -> Path:
    """The state of AdamW after the last epoch."""
    return checkpoint(study) / OPTIMIZER


def load_model(folder: Path) -> tuple[Any, Any]:
    """The model, float32, in inference mode, and the tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def questions(study: Study) -> list[dict[str, Any]]:
    """The facts that training made likelier, as ``trackstar evaluate`` reads them, with both kinds of gold.

    Raises:
        FileNotFoundError: this part has not run.
    """
    return [fact for fact in study.read("provenance")["facts"] if fact["asked"]]


def main(argv: list[str] | None = None) -> int:
    """Fine-tune, then measure every fact before and after."""
    here = study(__doc__, argv)
    passages, facts = corpus.load(here)
    losses = fine_tune(here, passages)
    before = answers(*load_model(checkpoint(here, 0)), facts)
    after = answers(*load_model(checkpoint(here)), facts)
    results = {
        "passages": len(passages),
        "training loss by epoch": losses,
        "facts": _asked(here, facts, before, after),
    }
    here.write("provenance", results, warmup=WARMUP, betas=BETAS)
    _write_questions(here)
    return 0


def fine_tune(here: Study, passages: Sequence[Passage]) -> list[float]:
    """Train on the passages, in another order each epoch; the mean loss of a token, by epoch."""
    for epoch in range(1, here.size.epochs + 1):
        if not checkpoint(here, epoch).is_dir():
            _train_epoch(here, passages, epoch)
    return [
        json.loads((checkpoint(here, epoch) / LOSS).read_text()) for epoch in range(1, here.size.epochs + 1)
    ]


def _train_epoch(here: Study, passages: Sequence[Passage], epoch: int) -> None:
    model, tokenizer = load_model(checkpoint(here, epoch - 1))
    optimizer = torch.optim.AdamW(
        model.parameters(), here.size.learning_rate, BETAS, weight_decay=0.0, fused=here.size.fast
    )
    state = checkpoint(here, epoch - 1) / OPTIMIZER
    if epoch > 1:
        optimizer.load_state_dict(torch.load(state, weights_only=True))
    encoded = [tokenizer(passage["text"])["input_ids"] for passage in passages]
    steps = batches([len(ids) for ids in encoded], here.size.batch, random.Random(f"{here.seed}/{epoch}"))
    total = tokens = 0.0
    for number, members in enumerate(steps):
        step = (epoch - 1) * len(steps) + number
        for group in optimizer.param_groups:
            group["lr"] = here.size.learning_rate * min(1.0, (step + 1) / WARMUP)
        ids, labels = padded([encoded[i] for i in members])
        with torch.autocast("cpu", torch.bfloat16, enabled=here.size.fast):
            logits, wanted = predictions(model, ids, labels)
            loss = functional.cross_entropy(logits, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total, tokens = total + loss.item() * len(wanted), tokens + len(wanted)
        if (number + 1) % 10 == 0:
            print(f"epoch {epoch}, step {number + 1} of {len(steps)}: loss {total / tokens:.3f}", flush=True)
    temporary = here.path("checkpoints", f"unfinished-{epoch}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    torch.save(optimizer.state_dict(), temporary / OPTIMIZER)
    write_whole(temporary / LOSS, json.dumps(total / tokens))
    temporary.rename(checkpoint(here, epoch))
    if epoch > 1:
        state.unlink()


def batches(lengths: Sequence[int], size: int, draw: random.Random) -> list[list[int]]:
    """Positions in batches of ``size`` in random order, the members of each nearly of one length."""
    order = list(range(len(lengths)))
    draw.shuffle(order)
    found = []
    for start in range(0, len(order), size * SORTED_TOGETHER):
        near = sorted(order[start : start + size * SORTED_TOGETHER], key=lambda i: lengths[i])
        found += [near[i : i + size] for i in range(0, len(near), size)]
    draw.shuffle(found)
    return found


def padded(
    sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T), padded at the end with 0, and labels (B, T): the ids, −100 where there is none.

    With ``starts``, a sequence has labels from that position on alone.
    """
    longest = max(map(len, sequences))
    ids, labels = (
        torch.zeros(len(sequences), longest, dtype=torch.long),
        torch.full((len(sequences), longest), IGNORED),
    )
    for i, sequence in enumerate(sequences):
        start = 0 if starts is None else starts[i]
        ids[i, : len(sequence)] = torch.tensor(sequence)
        labels[i, start : len(sequence)] = ids[i, start : len(sequence)]
    return ids, labels


def predictions(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, V) of the n predictions that count, example after example, and the tokens (n,) wanted there.

    Padding stands at the end, so no token that counts attends to it.
    """
    counted = labels[:, 1:] != IGNORED
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return model.lm_head(hidden[counted]), labels[:, 1:][counted]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> list[tuple[float, bool]]:
    """For each fact the log-probability of its answer, and whether the model gives it, choosing likeliest tokens."""
    prompts = [tokenizer(fact.prompt)["input_ids"] for fact in facts]
    targets = [tokenizer(fact.target, add_special_tokens=False)["input_ids"] for fact in facts]
    whole = [before + after for before, after in zip(prompts, targets, strict=True)]
    found = {}
    for members in length_batches([len(ids) for ids in whole], TOKENS):
        given = padded([whole[i] for i in members], [len(prompts[i]) for i in members])
        logits, wanted = predictions(model, *given)
        log_p = logits.log_softmax(1).gather(1, wanted[:, None])[:, 0]
        right = logits.argmax(1) == wanted
        counts = [len(targets[i]) for i in members]
        for i, mine, hits in zip(members, log_p.split(counts), right.split(counts), strict=True):
            found[i] = mine.double().sum().item(), bool(hits.all())
    return [found[i] for i in range(len(facts))]


def _asked(
    here: Study,
    facts: Sequence[Fact],
    before: Sequence[tuple[float, bool]],
    after: Sequence[tuple[float, bool]],
) -> list[dict[str, Any]]:
    """Every fact with what the model makes of it; asked are those that rose, evenly spread, as many as wanted."""
    measured = []
    for fact, (then, knew), (now, knows) in zip(facts, before, after, strict=True):
        measured.append(
            {
                "id": fact.id,
                "relation": fact.relation,
                "form": fact.form,
                "prompt": fact.prompt,
                "target": fact.target,
                "gold": list(fact.relation_gold),
                "lexical_gold": list(fact.lexical_gold),
                "log-probability before": then,
                "log-probability after": now,
                "knew": knew,
                "knows": knows,
                "asked": False,
            }
        )
    rose = [fact for fact in measured if fact["log-probability after"] > fact["log-probability before"]]
    count = min(here.size.queries, len(rose))
    for i in range(count):
        rose[i * len(rose) // count]["asked"] = True
    gains = [fact["log-probability after"] - fact["log-probability before"] for fact in measured]
    print(
        f"{len(rose)} of {len(facts)} facts rose, by a factor of {math.exp(statistics.median(gains)):.1f} in the "
        f"median; greedily right: {sum(f['knew'] for f in measured)} before, {sum(f['knows'] for f in measured)} after"
    )
    return measured


def _write_questions(here: Study) -> None:
    lines = [json.dumps(question, ensure_ascii=False) for question in questions(here)]
    write_whole(here.path("questions.jsonl"), "\n".join(lines) + "\n")
    passages, _ = corpus.load(here)
    lines = [json.dumps(passage, ensure_ascii=False) for passage in passages]
    write_whole(here.path("passages.jsonl"), "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
