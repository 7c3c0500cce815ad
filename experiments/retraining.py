"""The small model, trained again on many training sets: each run is kept, so that a study goes on where it stopped."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from trackstar.gradients.examples import Encoded, EncodedQuery
from trackstar.progress import track

from experiments.small_model import Setup, Texts, measure, train
from experiments.study import Study


@dataclasses.dataclass(frozen=True)
class Run:
    """One training set, as positions in ascending order, and the seed of its training."""

    chosen: tuple[int, ...]
    seed: int


def kept_runs(here: Study) -> Path:
    """The folder of the runs, which studies of all sizes and seeds share."""
    return here.folder.parent / "retrained"


def half_subsets(count: int, passages: int, seed: int = 0) -> list[tuple[int, ...]]:
    """``count`` random halves of the positions below ``passages``, each in ascending order."""
    generator = np.random.default_rng(seed)
    halves = (generator.permutation(passages)[: passages // 2] for _ in range(count))
    return [tuple(sorted(half.tolist())) for half in halves]


def by_kind(seen: np.ndarray) -> dict[str, np.ndarray]:
    """The groups of questions that figures are given for, (Q,) bool each.

    Args:
        seen: (Q,) bool, whether a question is about a training passage.
    """
    return {
        "all": np.ones_like(seen),
        "about training passages": seen,
        "about passages held out": ~seen,
    }


def answers_of(
    folder: Path, texts: Texts, setup: Setup, runs: Sequence[Run], processes: int = 1
) -> np.ndarray:
    """(runs, Q) float64: each query's Σ log p(target) by a model trained as each run says.

    Runs that ``folder`` has are read, the others are trained in ``processes`` processes and kept there.
    """
    passages, queries = texts.encoded(), texts.encoded_queries()
    files = [folder / f"{_key(passages, queries, setup, run)}.npy" for run in runs]
    missing = {file: run for file, run in zip(files, runs, strict=True) if not file.exists()}
    folder.mkdir(parents=True, exist_ok=True)
    with track("training", len(missing)) as advance:
        for _ in _train_all(passages, queries, setup, missing, processes):
            advance(1)
    return np.stack([np.load(file) for file in files])


def _train_all(
    passages: Sequence[Encoded],
    queries: Sequence[EncodedQuery],
    setup: Setup,
    missing: dict[Path, Run],
    processes: int,
) -> Iterator[None]:
    if processes == 1:
        _set_up(passages, queries, setup)
        yield from map(_train_one, missing.items())
    elif missing:
        context = get_context("spawn")
        with ProcessPoolExecutor(processes, context, _set_up, (passages, queries, setup)) as pool:
            yield from pool.map(_train_one, missing.items())


_shared: tuple[Sequence[Encoded], Sequence[EncodedQuery], Setup]


def _set_up(passages: Sequence[Encoded], queries: Sequence[EncodedQuery], setup: Setup) -> None:
    """What every run of this process shares."""
    global _shared
    torch.set_num_threads(1)
    _shared = passages, queries, setup


def _train_one(item: tuple[Path, Run]) -> None:
    file, run = item
    passages, queries, setup = _shared
    model, _ = train(passages, run.chosen, run.seed, setup)
    temporary = file.with_name(f"{file.stem}.{os.getpid()}.npy")
    np.save(temporary, measure(model, queries))
    temporary.replace(file)


def _key(passages: Sequence[Encoded], queries: Sequence[EncodedQuery], setup: Setup, run: Run) -> str:
    """A name for everything that a run's answers depend on."""
    texts = [[example.tokens.tolist(), example.labels.tolist()] for example in [*passages, *queries]]
    training = {"epochs": setup.epochs, "batch": setup.batch, "lr": setup.lr}
    said = json.dumps([texts, training, run.chosen, run.seed, torch.__version__])
    return hashlib.blake2b(said.encode(), digest_size=12).hexdigest()
