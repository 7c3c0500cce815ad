"""What the parts of the study share: its sizes, the folder it works in, and the JSON each part leaves there."""

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trackstar
import transformers

from benchmarks.machine import processor
from trackstar_kernels import _C


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a run of the study is.

    Attributes:
        passages: in the corpus.
        facts: of each relation, in each form, that are put to the model.
        epochs: that the model is fine-tuned for.
        batch: passages in a step.
        learning_rate: of AdamW.
        fast: whether training multiplies in bfloat16 and AdamW is torch's fused one; weights, and all else that the
            study computes, are float32.
        ekfac: name patterns of the modules that EK-FAC is fitted on.
        queries: that are asked, at most.
        left_out: parts and sweeps that are run only by their names.
    """

    passages: int
    facts: int
    epochs: int
    batch: int
    learning_rate: float
    fast: bool
    ekfac: tuple[str, ...]
    queries: int
    left_out: tuple[str, ...] = ()


SIXTH_LAYERS = ("model.layers.[05].mlp*", "model.layers.[12][05].mlp*")
"""The MLPs of layers 0, 5, 10, 15, 20 and 25 of SmolLM2's 30."""

LONG = ("lds", "removal", "checkpoint", "equal_size", "kind")
"""What does not fit into the minutes that the small study may take."""

SIZES = {
    "small": Size(320, 8, 3, 8, 1e-4, False, SIXTH_LAYERS, 60, LONG),
    "medium": Size(640, 16, 2, 8, 1e-4, False, SIXTH_LAYERS, 120),
    "full": Size(3000, 60, 1, 32, 2e-4, True, SIXTH_LAYERS, 300),
}
"""small: minutes on two cores. medium: some of an hour. full: the figures of docs/evidence.md, hours."""


@dataclasses.dataclass(frozen=True)
class Study:
    """One run of the study: everything it makes lies under ``folder``.

    Attributes:
        folder: of this size and seed.
        name: of the size.
        seed: of everything that is drawn.
        corpus: folder of passages and facts of the user's own (``corpus.read``); None for the study's.
    """

    folder: Path
    name: str
    seed: int
    corpus: Path | None = None

    @property
    def size(self) -> Size:
        """What the name stands for."""
        return SIZES[self.name]

    def path(self, *parts: str) -> Path:
        """A path under the folder, whose parent exists."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, part: str, results: Any, **settings: Any) -> Path:
        """Leave a part's results, with what they depend on, as ``results/<part>.json``."""
        record = {
            "part": part,
            "size": self.name,
            "seed": self.seed,
            "versions": versions(),
            "settings": dataclasses.asdict(self.size) | settings,
            "machine": machine(),
            "results": results,
        }
        path = self.path("results", f"{part}.json")
        write_whole(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        print(f"{part}: {path}", flush=True)
        return path

    def read(self, part: str) -> Any:
        """A part's results.

        Raises:
            FileNotFoundError: the part has not run.
        """
        path = self.folder / "results" / f"{part}.json"
        if not path.is_file():
            raise FileNotFoundError(f"run `python -m experiments.{part} --size {self.name}` first: no {path}")
        return json.loads(path.read_text(encoding="utf-8"))["results"]


def study(description: str | None, argv: list[str] | None = None) -> Study:
    """The study that the command line names."""
    return chosen(parser(description).parse_args(argv))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every part has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--work", type=Path, default=Path(".evidence"), help="where everything is kept")
    options.add_argument("--size", choices=SIZES, default="small")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--corpus", type=Path, help="folder of passages.jsonl and facts.jsonl of your own")
    return options


def chosen(given: argparse.Namespace) -> Study:
    """The study of these options."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = f"{given.size}-{given.seed}" + (f"-{given.corpus.resolve().name}" if given.corpus else "")
    return Study(given.work / name, given.size, given.seed, given.corpus)


def cached(path: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor kept at ``path``, mapped into memory; made and kept there first where it is not."""
    if not path.is_file():
        start = time.perf_counter()
        temporary = path.with_name(path.name + ".new")
        torch.save(make(), temporary)
        temporary.replace(path)
        print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)
    return torch.load(path, mmap=True, weights_only=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is whole or absent."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Of what computes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trackstar": trackstar.__version__,
    }


def machine() -> dict[str, Any]:
    """That computes."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
    }
