"""Tail-patch: how much likelier one training step on a passage makes an answer."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trackstar.evaluation.adam_step import AdamStep
from trackstar.gradients.examples import (
    IGNORED,
    Encoded,
    EncodedQuery,
    check_vocabulary,
    encode_examples,
    encode_queries,
    length_batches,
)
from trackstar.gradients.passes import BATCH_TOKENS, check_model, has_loss, position_limit, vocabulary_size
from trackstar.progress import track
from trackstar.storage import fingerprint

REDUCTIONS = ("mean", "sum")


@dataclasses.dataclass(frozen=True)
class TailPatch:
    """Log-probabilities of the queries' targets, log p = Σ_t log p(token t), before and after steps.

    Attributes:
        before: (Q,) float64, by the model as it is.
        idle: (Q,) float64, after a step whose gradient is zero: what momentum and weight decay alone do, whatever the
            passage.
        after: (Q, K) float64, after one step on the query's k-th proponent; NaN where it has fewer than K.
    """

    before: torch.Tensor
    idle: torch.Tensor
    after: torch.Tensor

    @property
    def gains(self) -> torch.Tensor:
        """(Q, K) float64: the change in probability, p after − p before."""
        return self.after.exp() - self.before.exp()[:, None]

    def gain(self, k: int) -> torch.Tensor:
        """(Q,) float64: each query's mean change over its first k proponents, or those that it has.

        The paper's tail-patch score is the mean of these over the queries.

        Raises:
            ValueError: k is not from 1 to K.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.after.shape[1]:
            raise ValueError(f"k must be an int from 1 to {self.after.shape[1]}, got {k!r}")
        return self.gains[:, :k].nanmean(1)


def tail_patch(
    model: nn.Module,
    optimizer_state: str | os.PathLike[str] | Mapping[str, Any],
    queries: Iterable[Mapping[str, Any]],
    proponents: Iterable[Sequence[Mapping[str, Any]]],
    *,
    tokenizer: Any = None,
    lr: float | None = None,
    reduction: str = "mean",
    momentum: bool = True,
    clip: float | None = None,
    processes: int = 1,
    keep: str | os.PathLike[str] | None = None,
) -> TailPatch:
    """Take one optimizer step on each proponent, each from the model as it is, and look at the answers.

    The step is that of the saved Adam or AdamW, with its moments
    (:class:`~trackstar.evaluation.adam_step.AdamStep`), without dropout. A passage that several
    queries share is stepped on once. After every step the weights are put back, bit for bit. Needs the weights twice,
    their gradients, and both moments, for each process.

    Args:
        model: a causal language model of transformers, weights float32 (or float64).
        optimizer_state: of Adam or AdamW; its ``state_dict()``, or a file or folder that holds one.
        queries: {"prompt": …, "target": …} or {"input_ids": …, "labels": …}; of several targets the first counts.
        proponents: of each query, training examples, best first: {"text": …} or {"input_ids": …, "labels": …}.
        tokenizer: the model's, for texts.
        lr: learning rate; None is the saved state's.
        reduction: loss of a step: "mean" or "sum" over the passage's predictions. What the training loop did with a
            batch, so that gradients are of the size that the moments know.
        momentum: False forgets the saved first moment, so that a step is along the passage's gradient alone, over √V.
            With it the saved momentum moves the model as well, the same way for every passage: ``idle`` says where to.
        clip: largest norm of a step's gradient, as the training loop clipped it; None leaves gradients as they are.
        processes: that take steps at the same time, on a CPU.
        keep: JSONL file that gets every step's outcome as it is known; a run that was stopped goes on from there.

    Raises:
        ValueError: an argument is not usable, or ``keep`` is of another model, optimizer step or loss.
        FloatingPointError: a step gives weights by which a target's probability is not a number.

    Source: Chang et al., arXiv 2410.17413, section 5.2.
    """
    asked = encode_queries(queries, tokenizer)
    limit, given = position_limit(model), list(proponents)
    if len(given) != len(asked):
        raise ValueError(
            f"proponents must be one list for each of the {len(asked)} queries, got {len(given)}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be None or above zero, got {clip!r}")
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise ValueError(f"processes must be an int of at least 1, got {processes!r}")
    _require_wide(model)
    check_model(model)
    check_vocabulary(asked, vocabulary_size(model), "queries")

    steps: dict[str, Encoded | None] = {"idle": None}
    names: list[list[str]] = []
    for q, passages in enumerate(given):
        encoded = encode_examples(passages, tokenizer, limit)
        check_vocabulary(encoded, vocabulary_size(model), f"proponents[{q}]")
        names.append([_name(passage) for passage in encoded])
        steps |= zip(names[-1], encoded, strict=True)
    wanted: dict[str, list[int]] = {"idle": list(range(len(asked)))}
    for q, row in enumerate(names):
        for name in dict.fromkeys(row):
            wanted.setdefault(name, []).append(q)

    patcher = _Patcher(model, optimizer_state, _Rule(lr, momentum, reduction, clip))
    kept = _Kept(None if keep is None else Path(keep), patcher.identity())
    keys = [_name(query) for query in asked]
    todo = [
        (name, steps[name], {keys[q]: asked[q] for q in members})
        for name, members in wanted.items()
        if any((name, keys[q]) not in kept.values for q in members)
    ]
    with track("tail-patch", len(wanted), len(wanted) - len(todo), unit="steps") as advance:
        for name, values in _run_all(patcher, optimizer_state, todo, processes):
            kept.add(name, values)
            advance(1)
    before = patcher.log_probabilities(asked)
    after = torch.full((len(asked), max(map(len, names))), math.nan, dtype=torch.float64)
    for q, row in enumerate(names):
        after[q, : len(row)] = torch.tensor([kept.values[name, keys[q]] for name in row], dtype=torch.float64)
    idle = torch.tensor([kept.values["idle", key] for key in keys], dtype=torch.float64)
    return TailPatch(before, idle, after)


Work = tuple[str, Encoded | None, dict[str, EncodedQuery]]
"""A step's name, the passage that it is on (None: a gradient of zero), and the queries to look at after it."""


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How a step is taken: the arguments of :func:`tail_patch` of these names."""

    lr: float | None
    momentum: bool
    reduction: str
    clip: float | None


class _Patcher:
    """Takes steps and puts the weights back."""

    def __init__(self, model: nn.Module, state: Any, rule: _Rule) -> None:
        self.model: Any = model
        self.rule = rule
        self.step = AdamStep(model, state, lr=rule.lr, momentum=rule.momentum)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._saved = [p.detach().clone() for p in self._trained]

    def identity(self) -> dict[str, Any]:
        """What every step's outcome depends on, beside the passage and the query."""
        return {
            "model": fingerprint.of_model(self.model),
            "step": self.step.settings(),
            "reduction": self.rule.reduction,
            "clip": self.rule.clip,
        }

    def __call__(self, passage: Encoded | None, queries: Sequence[EncodedQuery]) -> list[float]:
        """Log p of the queries' targets after one step on the passage."""
        with self._restoring():
            if passage is None or not has_loss(passage):
                for parameter in self._trained:
                    parameter.grad = torch.zeros_like(parameter)
            else:
                log_p = self._predictions([passage])[0]
                loss = -(log_p.mean() if self.rule.reduction == "mean" else log_p.sum())
                loss.backward()
                if self.rule.clip is not None:
                    nn.utils.clip_grad_norm_(self._trained, self.rule.clip)
            self.step.take()
            values = self.log_probabilities(queries)
        if not values.isfinite().all():
            name = "no passage" if passage is None else f"passage {passage.id!r}"
            raise FloatingPointError(
                f"a step on {name} leaves targets without a probability: is lr too large?"
            )
        return values.tolist()

    @torch.no_grad()
    def log_probabilities(self, queries: Sequence[EncodedQuery]) -> torch.Tensor:
        """(Q,) float64: log p of each query's target."""
        values = torch.zeros(len(queries), dtype=torch.float64)
        training = self.model.training
        self.model.eval()
        for members in length_batches([len(query) for query in queries], BATCH_TOKENS):
            predictions = self._predictions([queries[i] for i in members])
            values[members] = torch.stack([log_p.double().sum().cpu() for log_p in predictions])
        self.model.train(training)
        return values

    def _predictions(self, examples: Sequence[Encoded]) -> list[torch.Tensor]:
        """Of each example (n,) log p of the tokens whose prediction counts."""
        device = self._trained[0].device
        longest = max(map(len, examples))
        tokens = torch.zeros(len(examples), longest, dtype=torch.long)
        labels = torch.full_like(tokens, IGNORED)
        mask = torch.zeros_like(tokens)
        for row, example in enumerate(examples):
            tokens[row, : len(example)] = torch.from_numpy(example.tokens)
            labels[row, : len(example)] = torch.from_numpy(example.labels)
            mask[row, : len(example)] = 1
        logits = self.model(
            input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False
        ).logits
        wanted = labels[:, 1:].to(device)
        return [
            -nn.functional.cross_entropy(row[:-1][here != IGNORED], here[here != IGNORED], reduction="none")
            for row, here in zip(logits, wanted, strict=True)
        ]

    @contextlib.contextmanager
    def _restoring(self) -> Iterator[None]:
        """The weights, gradients and mode of the model are put back after the block, whatever happens in it."""
        gradients, training = [p.grad for p in self._trained], self.model.training
        for parameter in self._trained:
            parameter.grad = None
        self.model.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, saved, gradient in zip(self._trained, self._saved, gradients, strict=True):
                    parameter.copy_(saved)
                    parameter.grad = gradient
            self.model.train(training)


class _Kept:
    """Outcomes by (step, query), in a file where one is given: its first line says what they depend on."""

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.values: dict[tuple[str, str], float] = {}
        self._path = path
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # A line that was cut off ends without a newline, and does not count.
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
        lines = [json.loads(line) for line in whole.split("\n") if line]
        if lines and lines[0] != identity:
            differs = [name for name, value in identity.items() if lines[0].get(name) != value]
            raise ValueError(f"keep must be of the same {' and '.join(differs)}, {path} is of another")
        for line in lines[1:]:
            self.values |= {(line["step"], query): value for query, value in line["log_p"].items()}
        temporary = path.with_name(path.name + ".new")
        temporary.write_text(
            "".join(json.dumps(line) + "\n" for line in lines or [identity]), encoding="utf-8"
        )
        temporary.replace(path)

    def add(self, step: str, log_p: dict[str, float]) -> None:
        """Keep what a step did."""
        self.values |= {(step, query): value for query, value in log_p.items()}
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "log_p": log_p}) + "\n")


def _run_all(
    patcher: _Patcher, state: Any, todo: Sequence[Work], processes: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """The outcome of each step, as they are known."""
    if processes == 1 or len(todo) < 2:
        yield from (_run_one(patcher, work) for work in todo)
        return
    # Files, as every process needs weights of its own to step; the moments are mapped, and shared.
    with tempfile.TemporaryDirectory() as folder:
        torch.save(patcher.model, Path(folder) / "model.pt")
        if isinstance(state, Mapping):
            torch.save(state, Path(folder) / "optimizer.pt")
            state = Path(folder) / "optimizer.pt"
        given = (Path(folder) / "model.pt", state, patcher.rule)
        with ProcessPoolExecutor(processes, get_context("spawn"), _set_up, given) as pool:
            yield from pool.map(_run_apart, todo)


def _run_one(patcher: _Patcher, work: Work) -> tuple[str, dict[str, float]]:
    name, passage, queries = work
    return name, dict(zip(queries, patcher(passage, list(queries.values())), strict=True))


_patcher: _Patcher
"""Of a process that takes steps."""


def _set_up(model: Path, state: Any, rule: _Rule) -> None:
    global _patcher
    torch.set_num_threads(1)
    _patcher = _Patcher(torch.load(model, weights_only=False), state, rule)


def _run_apart(work: Work) -> tuple[str, dict[str, float]]:
    return _run_one(_patcher, work)


def _name(example: Encoded) -> str:
    """Of what the model reads, so that equal passages are one."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(len(example).to_bytes(8, "little") + example.tokens.tobytes() + example.labels.tobytes())
    return digest.hexdigest()


def _require_wide(model: nn.Module) -> None:
    """Steps of a small learning rate vanish in narrow weights."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"model must have float32 weights, {name!r} is {parameter.dtype}")
