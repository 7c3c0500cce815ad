"""EK-FAC's influences beside kronfluence's: ``python -m benchmarks.agreement [PACKAGES]``. Nothing is timed.

A small GPT-2 is trained on the source of Python's standard library, and both libraries score every pair of a query and
a training example. kronfluence goes into a folder of its own, without its dependencies, so that it replaces nothing
of this environment; agreement_kronfluence.py runs with it in a process of its own. Definitions are made to agree:
biases are columns, tokens after the last prediction do not count, damping is 0.1 of the mean eigenvalue. Labels are
drawn from the model; once both sides take the same, and once each draws its own, which shows what the draw alone does.
Stops with an error where the same labels give a correlation of at most 0.99.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from trackstar.ekfac import fit_factors, influence
from trackstar.ekfac.capture import TokenCapture
from trackstar.ekfac.inverse import DampedInverse
from trackstar.ekfac.sampling import coins_of, draw
from trackstar.ekfac.scoring import scores_of, thin_queries
from trackstar.gradients.examples import encode_examples, encode_queries

from benchmarks.correction import make_text
from benchmarks.machine import RESULTS, save

KRONFLUENCE = "kronfluence==1.0.1"
NEEDED = ("einops", "einconv", "opt-einsum")
"""What it imports beside torch, accelerate, safetensors and tqdm, which are here."""

TOKENS, TARGET = 64, 8
RANK = 32
AGREEMENT = 0.99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path, nargs="?", default=RESULTS / "kronfluence")
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--queries", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    install(arguments.packages.resolve())
    model = train(arguments.steps)
    text = make_text(8 * arguments.steps + arguments.queries)[:, :TOKENS]
    given = [{"input_ids": ids.tolist()} for ids in text[: arguments.examples]]
    queries = [
        {"input_ids": ids.tolist(), "labels": [-100] * (TOKENS - TARGET) + ids[-TARGET:].tolist()}
        for ids in text[-arguments.queries :]
    ]
    with tempfile.TemporaryDirectory() as folder:
        ours = {f"draw {seed}": own_scores(Path(folder), model, given, queries, seed) for seed in (0, 1)}
        theirs = their_scores(arguments.packages.resolve(), Path(folder), model, given, queries)
    pairs = {
        "the same labels": (ours["draw 0"]["whole"], theirs["same labels"]),
        f"the same labels, both of rank {RANK}": (ours["draw 0"]["thin"], theirs["same labels, thin"]),
        "each its own labels": (ours["draw 0"]["whole"], theirs["own labels"]),
        "ours, with two draws of labels": (ours["draw 0"]["whole"], ours["draw 1"]["whole"]),
        f"ours, of rank {RANK} and whole": (ours["draw 0"]["thin"], ours["draw 0"]["whole"]),
    }
    title = f"{arguments.queries} queries × {arguments.examples} examples, {KRONFLUENCE}"
    table = Table("scores", "correlation", "lowest of a query", "top-10 overlap", title=title)
    cases = []
    for label, (left, right) in pairs.items():
        by_query = [correlation(a, b) for a, b in zip(left, right, strict=True)]
        case = {
            "correlation": correlation(left, right),
            "lowest": min(by_query),
            "overlap": overlap(left, right),
        }
        table.add_row(label, f"{case['correlation']:.6f}", f"{case['lowest']:.6f}", f"{case['overlap']:.3f}")
        cases.append({"scores": label} | case)
    Console().print(table)
    Console().print(f"written: {save('agreement', cases)}")
    if cases[0]["correlation"] <= AGREEMENT:
        raise SystemExit(f"the same labels must give a correlation above {AGREEMENT}")


def install(packages: Path) -> None:
    """kronfluence and what it alone needs, in a folder of their own."""
    if not (packages / "kronfluence").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(packages)]
        subprocess.run([*pip, KRONFLUENCE, *NEEDED], check=True, stdout=sys.stderr)


def train(steps: int) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in make_text(8 * steps)[:, :TOKENS].split(8):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()


def own_scores(folder, model, given, queries, seed):
    """{"whole", "thin"}: (Q, N) scores at full rank, in corpus order, and of rank RANK."""
    factors = fit_factors(folder / f"factors-{seed}", model, given, biases=True, seed=seed)
    result = influence(factors, model, given, queries, k=len(given), rank=RANK)
    whole = torch.empty_like(result.scores).scatter_(1, result.indices, result.scores)
    capture, inverse = TokenCapture(model, biases=True), DampedInverse(factors, 0.1, torch.device("cpu"))
    thin = thin_queries(capture, encode_queries(queries, None), inverse, RANK, "loss")
    return {
        "whole": whole,
        "thin": scores_of(capture, encode_examples(given, None), thin, lambda count: None),
    }


def their_scores(packages, folder, model, given, queries):
    """{"same labels", "same labels, thin", "own labels"}: (Q, N) scores of kronfluence."""
    model.save_pretrained(folder / "model")
    save_file(
        {
            "examples": torch.tensor([example["input_ids"] for example in given]),
            "drawn": drawn_labels(model, given),
            "queries": torch.tensor([query["input_ids"] for query in queries]),
            "targets": torch.tensor([query["labels"] for query in queries]),
        },
        folder / "tokens.safetensors",
    )
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(packages), str(root)])
    command = [sys.executable, "-m", "benchmarks.agreement_kronfluence", str(folder), str(RANK)]
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # In the folder itself, as kronfluence writes its results where it runs.
    subprocess.run(command, env=environment, cwd=folder, check=True, stdout=sys.stderr)
    return load_file(folder / "scores.safetensors")


def drawn_labels(model, given):
    """(N, T − 1) the labels that fit_factors draws with seed 0."""
    labels = []
    for index, example in enumerate(encode_examples(given, None)):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(example.tokens).long()[None]).logits[0, :-1]
        labels.append(draw(logits.softmax(1), coins_of(example, 0, index)))
    return torch.stack(labels)


def correlation(left, right):
    """Pearson's, over all entries."""
    return torch.corrcoef(torch.stack([left.double().flatten(), right.double().flatten()]))[0, 1].item()


def overlap(left, right):
    """Share of each query's ten best that both have, on average."""
    best = [scores.topk(10, dim=1).indices for scores in (left, right)]
    shared = (best[0][:, :, None] == best[1][:, None, :]).any(2)
    return shared.float().mean().item()


if __name__ == "__main__":
    main()
