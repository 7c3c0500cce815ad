"""Fitting the factors: twice over a sample of the corpus, interruptible at any moment.

The first pass sums x xᵀ and δ δᵀ over tokens; their eigenvectors are the bases. The second sums squares of examples'
gradients in these bases. Labels are drawn from the model in both, the same ones. Sums are taken chunk by chunk of a
fixed division of the sample, and kept on disk now and then, so a fit that was killed and taken up again ends with the
same bytes.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trackstar.ekfac.capture import OnTokens, TokenBatch, TokenCapture, reaching
from trackstar.ekfac.factors import Factors, basis_name, open_factors, read_tensor, write_tensors
from trackstar.ekfac.plan import plan_fit
from trackstar.ekfac.record import NAME, Record
from trackstar.ekfac.sampling import coins_of, sampled_nll
from trackstar.errors import StoreError
from trackstar.gradients.examples import Encoded, check_vocabulary, encode_examples
from trackstar.gradients.passes import WINDOW, check_model, has_loss, position_limit, vocabulary_size
from trackstar.progress import console, track
from trackstar.storage import fingerprint
from trackstar.storage.durable import make_folder, remove_folder
from trackstar.storage.sealed import SealedFolder
from trackstar.storage.writer import first_difference, locked

SAMPLE = 10_000
"""Examples that factors are fitted on, where there are more."""

SAVE_EVERY = 60.0
"""Seconds between two times that the running sums are kept on disk, at least."""

SAVE_SHARE = 0.1
"""Share of the time between them that keeping the sums may take."""


def fit_factors(
    path: str | os.PathLike[str],
    model: nn.Module,
    examples: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    modules: Sequence[str] | None = None,
    biases: bool = False,
    seed: int = 0,
    sample: int = SAMPLE,
    resume: bool = True,
) -> Factors:
    """Fit EK-FAC's approximation of a model's Gauss–Newton Hessian, and keep it in a folder.

        G ≈ (Q_S ⊗ Q_A) diag(Λ) (Q_S ⊗ Q_A)ᵀ  for each matrix, with
        A = E[x xᵀ] = Q_A · Q_Aᵀ,  S = E[δ δᵀ] = Q_S · Q_Sᵀ  over the tokens that reach a loss, and
        Λ = E[(Q_Sᵀ g Q_A)²]  over examples, g = Σ_t δ_t x_tᵀ (O, I) being an example's gradient

    where x is a token's input, δ its output gradient, and the gradients are those of the negative log-likelihood of
    labels drawn from the model itself (the true Fisher), in the places of the examples' own.

    Says first what it will need (memory, disk, time), then shows progress. May be killed at any moment: the next
    call with the same arguments goes on and ends with the same bytes. Products are float32, sums float64.

    Args:
        path: folder of the factors; made if missing.
        model: a causal language model of transformers, with finite weights.
        examples: {"text": …} or {"input_ids": …, "labels": … (optional)}, such as the training corpus.
        tokenizer: the model's, for examples given as text.
        modules: shell patterns of module names, as in ``SketchSpec``; None takes all attention and MLP matrices. The
            paper takes the MLPs alone.
        biases: take each module's bias as one more column of its matrix.
        seed: of the drawn labels.
        sample: examples to fit on; all that have a loss, where there are no more, else a fixed choice.
        resume: False refuses a path that already holds factors.

    Raises:
        ValueError: an argument is not usable, or a module receives no gradient from any example.
        StoreError: ``path`` holds something else, or factors of another model, corpus, seed or set of modules (the
            difference is named), or another process is fitting there.
        OSError: the disk is full or cannot be written; what was committed stays.
        FloatingPointError: an example's gradient is NaN or Inf.
        RuntimeError: a module does not run exactly once in a pass.

    Source: Grosse et al., "Studying large language model generalization with influence functions", arXiv 2308.03296,
    sections 2 and 3; George et al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis",
    NeurIPS 2018 (Λ).
    """
    path = Path(path)
    for name, value, low, high in (("seed", seed, 0, 2**64 - 1), ("sample", sample, 1, 2**63 - 1)):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} must be an int from {low} to {high}, got {value!r}")
    encoded = encode_examples(examples, tokenizer, position_limit(model))
    check_vocabulary(encoded, vocabulary_size(model), "examples")
    check_model(model)
    capture = TokenCapture(model, modules, biases=biases)
    indices = [i for i, example in enumerate(encoded) if has_loss(example)]
    if not indices:
        raise ValueError("examples must hold at least one with a token to predict")
    if sample < len(indices):
        indices = sorted(np.random.default_rng(0).choice(indices, sample, replace=False).tolist())
    identity = {
        "modules": {name: list(shape) for name, shape in capture.shapes.items()},
        "biases": biases,
        "seed": seed,
        "sample": len(indices),
        "model": fingerprint.of_model(model),
        "tokenizer": fingerprint.of_tokenizer(tokenizer),
        "examples": fingerprint.of_examples(encoded),
    }
    with _fitting(path, Record(identity), resume=resume) as record:
        if record.eigenvalues is None:
            fit = _Fit(path, capture, encoded, indices, seed, record)
            plan = plan_fit(path, capture, [encoded[i] for i in indices], done=fit.passes_done)
            console().print(str(plan), soft_wrap=True)
            for reason in capture.lean.skipped:
                console().print(f"slower than it could be: {reason}", soft_wrap=True)
            plan.require_disk()
            if not record.has_bases:
                fit.find_bases(fit.sum_covariances())
            fit.find_eigenvalues()
        remove_folder(path / "sums")
    return open_factors(path)


class _Fit:
    """What one call of :func:`fit_factors` works with."""

    def __init__(
        self,
        path: Path,
        capture: TokenCapture,
        examples: Sequence[Encoded],
        indices: Sequence[int],
        seed: int,
        record: Record,
    ) -> None:
        self._path = path
        self._capture = capture
        self._examples = [examples[i] for i in indices]
        self._indices = indices
        self._seed = seed
        self._record = record

    @property
    def passes_done(self) -> float:
        """How many of the two passes over the examples are done."""
        return self._record.has_bases + self._record.summed / len(self._examples)

    def sum_covariances(self) -> dict[str, torch.Tensor]:
        """Σ x xᵀ and Σ δ δᵀ over the tokens of all examples, by "<module>/input" and "<module>/output"."""
        shapes = {}
        for name, (fan_out, fan_in) in self._capture.shapes.items():
            shapes[f"{name}/input"], shapes[f"{name}/output"] = (fan_in, fan_in), (fan_out, fan_out)
        sums = self._load_sums(shapes)

        def add(name: str, x: torch.Tensor, delta: torch.Tensor, batch: TokenBatch) -> None:
            sums[f"{name}/input"] += x.T @ x
            sums[f"{name}/output"] += delta.T @ delta

        self._sum_up("covariances", sums, add)
        if self._record.summed < len(self._examples):
            self._save_sums(len(self._examples), sums)
        return sums

    def find_bases(self, sums: Mapping[str, torch.Tensor]) -> None:
        """Commit the eigenvectors of every module's covariances, one module after another."""
        tokens = sum(reaching(example) for example in self._examples)
        names = list(self._capture.shapes)
        last: tuple[torch.Tensor, torch.Tensor] | None = None
        with track("eigenvectors", len(names), len(self._record.bases), unit="modules") as advance:
            for number in range(len(self._record.bases), len(names)):
                by_input, by_output = (
                    sums[f"{names[number]}/{side}"] / tokens for side in ("input", "output")
                )
                # Neighbours often have the same input: queries, keys and values, an MLP's gate and its up.
                if last is None or not torch.equal(last[0], by_input):
                    last = by_input, torch.linalg.eigh(by_input).eigenvectors.float()
                bases = {"input": last[1], "output": torch.linalg.eigh(by_output).eigenvectors.float()}
                seal = write_tensors(self._path / basis_name(number), bases)
                record = replace(self._record, bases=(*self._record.bases, seal))
                self._commit(replace(record, summed=0, sums=None) if record.has_bases else record)
                advance(1)

    def find_eigenvalues(self) -> None:
        """Commit Λ of every module.

        Raises:
            ValueError: a module receives no gradient.
        """
        factors = Factors(self._path, self._record)
        sums = self._load_sums(self._capture.shapes)
        bases = {name: tuple(q.to(sums[name].device) for q in factors.basis(name)) for name in sums}

        def add(name: str, x: torch.Tensor, delta: torch.Tensor, batch: TokenBatch) -> None:
            by_input, by_output = bases[name]
            total = torch.zeros(sums[name].shape, device=x.device)
            for a, d in zip(
                (x @ by_input).split(batch.tokens), (delta @ by_output).split(batch.tokens), strict=True
            ):
                gradient = d.T @ a
                total.addcmul_(gradient, gradient)
            sums[name] += total

        self._sum_up("eigenvalues", sums, add)
        for name, total in sums.items():
            if not total.any():
                raise ValueError(f"modules must receive a gradient; {name!r} receives none from any example")
        means = {name: (total / len(self._examples)).float() for name, total in sums.items()}
        seal = write_tensors(self._path / "eigenvalues", means)
        self._commit(replace(self._record, summed=0, sums=None, eigenvalues=seal))

    def _sum_up(self, label: str, sums: Mapping[str, torch.Tensor], add: OnTokens) -> None:
        """Show ``add`` the tokens of the examples that the sums do not hold yet, chunk by chunk."""
        count = len(self._examples)
        saved, pause = time.monotonic(), SAVE_EVERY
        with track(label, count, self._record.summed) as advance:
            for start in range(self._record.summed, count, WINDOW):
                part = self._examples[start : start + WINDOW]
                coins = self._coins_of(part, self._indices[start:])
                for batch in self._capture.run(part, add, loss=sampled_nll, labels_of=coins):
                    advance(len(batch.members))
                if start + WINDOW < count and time.monotonic() - saved >= pause:
                    began = time.monotonic()
                    self._save_sums(start + WINDOW, sums)
                    saved = time.monotonic()
                    pause = max(SAVE_EVERY, (saved - began) / SAVE_SHARE)

    def _coins_of(self, examples: Sequence[Encoded], indices: Sequence[int]) -> Callable[[int], torch.Tensor]:
        return lambda i: coins_of(examples[i], self._seed, indices[i])

    def _load_sums(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
        """The running sums on disk, or zeros, float64, on the model's device."""
        device = next(self._capture.lean.model.parameters()).device
        if self._record.sums is None:
            return {
                key: torch.zeros(shape, dtype=torch.float64, device=device) for key, shape in shapes.items()
            }
        folder = SealedFolder(self._path, self._record.sums_name, self._record.sums)
        folder.require()
        # Cloned, as what is read is mapped.
        return {
            key: read_tensor(folder, key, torch.float64, shape).clone().to(device)
            for key, shape in shapes.items()
        }

    def _save_sums(self, summed: int, sums: Mapping[str, torch.Tensor]) -> None:
        """Commit the sums of the first ``summed`` examples, and remove those they replace."""
        record = replace(self._record, summed=summed)
        seal = write_tensors(self._path / record.sums_name, sums)
        before = None if self._record.sums is None else self._path / self._record.sums_name
        self._commit(replace(record, sums=seal))
        if before is not None:
            remove_folder(before)

    def _commit(self, record: Record) -> None:
        record.write(self._path)
        self._record = record


@contextlib.contextmanager
def _fitting(path: Path, begun: Record, *, resume: bool) -> Iterator[Record]:
    """Hold the lock of the factors to be made, or to be gone on with, at ``path``; what is committed there."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"path must be a folder, got the file {path}")
    make_folder(path)
    others = {entry.name for entry in path.iterdir()} - {"lock", f"{NAME}.new"}
    if others and NAME not in others:
        raise StoreError(
            f"path must be an empty folder or hold factors; {path} holds {min(others)!r} and no {NAME}"
        )
    with locked(path, "factors"):
        record = Record.read(path)
        if record is None:
            begun.write(path)
            record = begun
        elif not resume:
            raise StoreError(f"path must not hold factors when resume=False; {path} does")
        first = first_difference(record.identity, begun.identity)
        if first is not None:
            field, kept, wanted = first
            raise StoreError(
                f"the factors at {path} were fitted with {field} = {kept!r}, this fit has {wanted!r}: "
                "fit into another folder"
            )
        yield record
