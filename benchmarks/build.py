"""Where a build's time goes: python -m benchmarks.build STORE --model DIR [--examples N] [--threads N].

Builds part of a finished store again, in a temporary folder, with the same spec and correction, and accounts for
every second: the model's own forward and backward pass, the kernels, and everything else (planning, fingerprints,
R_train, whitening's set-up, writing, syncing to disk).
"""

import argparse
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import trackstar
import transformers
from rich.console import Console
from rich.table import Table
from trackstar.gradients import collector, lean
from trackstar.storage import build

from benchmarks.machine import describe, save


class Clock:
    """Seconds spent in functions, each without those inside it that are measured too."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = [0.0]

    def measured(self, name, function):
        """``function``, its time counted under ``name``."""

        def run(*args, **kwargs):
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - began
                self.seconds[name] += whole - self._inner.pop()
                self._inner[-1] += whole

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    print(describe())
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    source = trackstar.open_store(arguments.store)
    step = max(1, len(source) // arguments.examples)
    examples = [{"input_ids": source.tokens(i), "text": source.text(i)} for i in range(0, len(source), step)][
        : arguments.examples
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        for owner, function, name in (
            (lean.LeanPass, "run", "model pass"),
            (collector, "project_gradients", "project_gradients"),
            (build, "encode_rows", "encode_rows"),
        ):
            measured = clock.measured(name, getattr(owner, function))
            patches.enter_context(mock.patch.object(owner, function, measured))
        whole = clock.measured("everything else", trackstar.build_store)
        whole(
            Path(folder) / "store",
            model,
            examples,
            spec=source.spec,
            correction=source.correction,
            dtype=source.dtype,
        )
    total = sum(clock.seconds.values())
    table = Table(title=f"Build of {len(examples)} examples, {arguments.threads} thread(s): {total:.1f} s")
    for column in ("part", "seconds", "share"):
        table.add_column(column, justify="right" if column != "part" else "left")
    for name, seconds in clock.seconds.items():
        table.add_row(name, f"{seconds:.2f}", f"{seconds / total:.1%}")
    console = Console()
    console.print(table)
    console.print(f"written: {save('build', dict(clock.seconds))}")


if __name__ == "__main__":
    main()
