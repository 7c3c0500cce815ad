"""bergson's scores of the small model's passages, by its own commands, in an environment of its own."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trackstar import SketchSpec
from trackstar.curvature import MIXING_COMPONENT

from benchmarks.peers_environment import OFFLINE, python_of
from experiments.small_model import Setup, Texts, train
from experiments.study import Study

SKETCH = SketchSpec().sketch
"""As ours: bergson projects every module to SKETCH × SKETCH too."""

BATCH_TOKENS = 128
"""It refuses more than the model's longest sequence."""

SAVE_SCORES = (
    "import sys, numpy; from pathlib import Path; from bergson.data import load_scores;"
    "numpy.save(sys.argv[2], load_scores(Path(sys.argv[1]))[:])"
)
"""A program for its Python: the scores (N, Q) of a folder, as a NumPy file."""


def bergson_scores(
    here: Study, texts: Texts, setup: Setup, environment: Path | None
) -> dict[str, torch.Tensor]:
    """(Q, N) scores by bergson's TrackStar and gradient cosine, of the model and the very tokens that ours are of.

    TrackStar runs as the paper has it: unit norms, the real second moments of the optimizer, and λ where the
    components cross that the paper names, scaled to D; without the second moments; and as the command comes.

    Args:
        here: keeps the scores.
        texts: passages and queries.
        setup: of the model's training.
        environment: of the peers, made where it is missing; None for what an earlier run kept, if one did.
    """
    kept = here.path("small-bergson.pt")
    if environment is not None and not kept.is_file():
        bergson = python_of(environment).with_name("bergson")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            size = _write(folder, texts, setup, here.seed)
            found = {
                line: _scores(bergson, folder / f"run{number}", commands)
                for number, (line, commands) in enumerate(_lines(folder, size).items())
            }
        torch.save(found, kept)
    return torch.load(kept) if kept.is_file() else {}


def _write(folder: Path, texts: Texts, setup: Setup, seed: int) -> int:
    """The model, its optimizer and the texts, as bergson reads them; D of the rows that it makes of them."""
    passages = texts.encoded()
    model, optimizer = train(passages, range(len(passages)), seed, setup)
    model.save_pretrained(folder / "model")
    texts.tokenizer.save_pretrained(folder / "model")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    _write_lines(folder / "passages.jsonl", texts.passages, ("input_ids",))
    _write_lines(folder / "queries.jsonl", texts.queries, ("input_ids", "labels"))
    return len(SketchSpec().weights(model)) * SKETCH**2


def _write_lines(file: Path, rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
    file.write_text("".join(json.dumps({field: row[field] for field in fields}) + "\n" for row in rows))


def _lines(folder: Path, size: int) -> dict[str, list[list[object]]]:
    """The commands of each line, run one after the other in a folder of its own; the last leaves its scores there."""
    passages, queries = folder / "passages.jsonl", folder / "queries.jsonl"
    shared = ["--model", folder / "model", "--projection_dim", SKETCH, "--token_batch_size", BATCH_TOKENS]
    unit = ["--unit_normalize", "true"]
    trackstar = ["trackstar", ".", *shared, "--data.dataset", passages, "--query.dataset", queries]
    trackstar += ["--overwrite", "true"]
    mixed = ["--target_downweight_components", round(MIXING_COMPONENT * size)]
    moments = ["--optimizer_state", folder / "optimizer.pt"]
    return {
        "bergson: TrackStar": [[*trackstar, *unit, *mixed, *moments]],
        "bergson: TrackStar without V": [[*trackstar, *unit, *mixed]],
        "bergson: TrackStar, its defaults": [trackstar],
        "bergson: cosine": [
            ["build", "query", *shared, "--dataset", queries],
            ["score", "scores", *shared, *unit, "--dataset", passages, "--query_path", "query"],
        ],
    }


def _scores(bergson: Path, folder: Path, commands: Sequence[Sequence[object]]) -> torch.Tensor:
    """(Q, N) float32 of what the commands leave in ``folder``."""
    folder.mkdir()
    output = folder / "scores.npy"
    for command in (
        *([bergson, *command] for command in commands),
        [bergson.with_name("python"), "-c", SAVE_SCORES, "scores", output],
    ):
        done = subprocess.run(
            [str(word) for word in command],
            cwd=folder,
            env=os.environ | OFFLINE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stdout.decode()[-3000:]}")
    return torch.from_numpy(np.load(output)).float().T.contiguous()
