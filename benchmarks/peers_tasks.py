"""A second task, ours and bergson's: ``python -m benchmarks.peers_tasks [ENVIRONMENT]``.

A small random Llama, its training examples, and two sets of queries, asked one after the other by command line: ours
builds a store and asks it twice, bergson's ``trackstar`` runs the training set twice for each set of queries. Both
project with 16 × 16 in float32, without an optimizer correction; a query is a text whose every token counts. Seconds
are the commands' own, starts included, which are those of ``--help`` and more. How far the answers agree is for
information: the projections are not the same. Makes a virtual environment of the peers' own (6 GB; downloads from
PyPI) unless ENVIRONMENT has one.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import tokenizers
import transformers

from benchmarks.correction import make_text
from benchmarks.machine import save
from benchmarks.peers_environment import ENVIRONMENT, OFFLINE, python_of

K, TOKENS = 10, 128
CONFIG = {
    "vocab_size": 260,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environment", type=Path, nargs="?", default=ENVIRONMENT)
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    peers = python_of(arguments.environment)
    bergson = peers.with_name("bergson")
    trackstar = Path(sysconfig.get_path("scripts")) / "trackstar"
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        write_texts(folder, arguments.examples, arguments.queries)
        for _ in range(arguments.rounds):
            for line, command in commands(folder, trackstar, bergson):
                seconds.setdefault(line, []).append(timed(command))
        overlaps = [overlap(peers, folder, task) for task in (1, 2)]
    figures = {line: median(taken) for line, taken in seconds.items()}
    print(f"{arguments.examples} examples and {arguments.queries} queries of {TOKENS} tokens, 1 thread")
    for line, taken in figures.items():
        print(f"{line:<24} {taken:>7.2f} s")
    second = figures["ours: task 2"] / figures["bergson: task 2"]
    print(f"a second task, ours ÷ bergson: {second:.3f}")
    print(f"top-{K} overlap of the tasks: {', '.join(f'{value:.2f}' for value in overlaps)}")
    print(f"written: {save('peers-tasks', {'seconds': figures, 'second task': second, 'overlap': overlaps})}")


def write_model(path: Path) -> None:
    """A Llama whose tokens are bytes."""
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(path)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    specials = ("<eos>", "<pad>")
    vocabulary = {token: i for i, token in enumerate([*alphabet, *specials])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(path)


def write_texts(folder: Path, examples: int, queries: int) -> None:
    """data.jsonl, and of each task queries for bergson (task1.jsonl) and for us (ours1.jsonl)."""
    tokens = make_text(examples + 2 * queries)[:, :TOKENS]
    texts = [bytes(ids.tolist()).decode("latin-1").encode("ascii", "replace").decode() for ids in tokens]
    parts = {"data": texts[:examples], "task1": texts[examples:-queries], "task2": texts[-queries:]}
    for name, part in parts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text(lines)
    for task in (1, 2):
        # Every token after the first is the target, as it is to bergson.
        lines = [json.dumps({"prompt": t[:1], "target": t[1:]}) for t in parts[f"task{task}"]]
        (folder / f"ours{task}.jsonl").write_text("\n".join(lines) + "\n")


def commands(folder: Path, trackstar: Path, bergson: Path) -> list[tuple[str, list[object]]]:
    """What is timed, in order."""
    model = ["--model", folder / "model"]
    build = [trackstar, "build", *model, "--data", folder / "data.jsonl", "--out", folder / "store"]
    found: list[tuple[str, list[object]]] = [
        ("ours: --help", [trackstar, "--help"]),
        ("ours: build", [*build, "--dtype", "float32"]),
    ]
    for task in (1, 2):
        asked = ["--queries", folder / f"ours{task}.jsonl", "--out", folder / f"answers{task}.jsonl"]
        found.append((f"ours: task {task}", [trackstar, "query", folder / "store", *model, *asked, "-k", K]))
    found.append(("bergson: --help", [bergson, "trackstar", "--help"]))
    for task in (1, 2):
        data = ["--data.dataset", folder / "data.jsonl", "--query.dataset", folder / f"task{task}.jsonl"]
        options = ["--projection_dim", 16, "--unit_normalize", "true", "--overwrite", "true"]
        command = [bergson, "trackstar", folder / f"run{task}", *model, *data, *options]
        found.append((f"bergson: task {task}", command))
    return found


def timed(command: Sequence[object]) -> float:
    """Seconds of a command, on one thread."""
    own = OFFLINE | {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    finished = subprocess.run(
        [str(word) for word in command],
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    taken = time.perf_counter() - began
    if finished.returncode:
        raise SystemExit(f"{command[0]} failed: {finished.stdout.decode()[-3000:]}")
    return taken


def overlap(peers: Path, folder: Path, task: int) -> float:
    """Mean share of our ten best that are among bergson's."""
    script = (
        "import sys, numpy; from pathlib import Path; from bergson.data import load_scores;"
        "numpy.save(sys.argv[2], load_scores(Path(sys.argv[1]))[:])"
    )
    output = folder / f"scores{task}.npy"
    command = [peers, "-c", script, folder / f"run{task}" / "scores", output]
    subprocess.run(command, env=os.environ | OFFLINE, check=True, stdout=sys.stderr)
    theirs = np.load(output).argsort(axis=0)[::-1][:K].T
    lines = (folder / f"answers{task}.jsonl").read_text().splitlines()
    ours = [[int(index) for index in json.loads(line)["proponent_ids"]] for line in lines]
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(ours, theirs.tolist(), strict=True)]))


if __name__ == "__main__":
    main()
