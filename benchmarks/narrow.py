"""What narrow rows keep of the answers: ``python -m benchmarks.narrow STORE --model DIR --queries FILE.jsonl``.

STORE has float32 rows, such as a build with ``--dtype float32``; benchmarks/questions.jsonl has questions for the
demo's. The rows are encoded in every dtype, as ``trackstar reencode`` does, and asked the same questions with the
task-mixed Hessian: how many of the ten best stay, and how many of the float32 rows' ten are among the fifty best.
Then narrow rows get a float16 copy beside them, in a temporary store, which a scan answers from: how many of the ten
best stay now, and how many rows that took. The last line is what the best code there can be of one bit a number would
keep (:func:`ideal_code`). Nothing is timed.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import trackstar
import transformers
from trackstar.curvature import choose_mixing
from trackstar.gradients.examples import encode_queries
from trackstar.scoring.attribution import query_rows
from trackstar.scoring.scan import Found, plan_scan
from trackstar.scoring.selection import select
from trackstar.storage.layout import Layout

from benchmarks.machine import save
from trackstar_kernels import encode_rows, mixed_topk
from trackstar_kernels.encode import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--queries", type=Path, required=True, help='JSONL of {"prompt": …, "target": …}')
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    store = trackstar.open_store(arguments.store)
    if store.dtype != "float32":
        raise SystemExit(f"STORE must have float32 rows, got {store.dtype}")
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    asked = [json.loads(line) for line in arguments.queries.read_text().splitlines()]
    raw = query_rows(store, model, encode_queries(asked, tokenizer), tokenizer=tokenizer)
    mixing = choose_mixing(raw, store.curvature.eigenvalues)
    rows, norms = store.rows(0, len(store)), store.squared_norms
    results = []
    print(f"{len(store)} rows of {store.row_shape}, {len(asked)} queries, λ = {mixing:.3f}")
    print(
        f"{'rows':<8} {'bytes a row':>11} {'top 10 kept':>11} {'within top 50':>13} {'error of a score':>16}"
        f" {'rescored: kept':>14} {'rows':>6}"
    )
    truth: tuple[torch.Tensor, torch.Tensor] | None = None
    for dtype in DTYPES:
        layout = Layout(dtype, None, *store.row_shape)
        curvature = store.curvature.with_rotation(layout.narrow)
        turn = curvature.whitening_from(store.curvature)
        codes, scales, _ = encode_rows(rows, turn if layout.narrow else None, dtype)
        queries, _, _ = encode_rows(raw, curvature.whitener, "float32")
        scores, indices = mixed_topk(queries, codes, norms, len(store), mixing, scales=scales)
        by_row = scores.gather(1, indices.argsort(1))
        truth = truth or (by_row, indices)
        kept = overlap(truth[1][:, :10], indices[:, :10])
        within = overlap(truth[1][:, :10], indices[:, :50])
        error = (by_row - truth[0]).square().mean().sqrt().item()
        line = {"dtype": dtype, "bytes": layout.row_bytes, "top 10": kept}
        line |= {"within top 50": within, "error": error}
        said = ""
        if layout.narrow:
            found = rescored(arguments.store, dtype, queries, mixing)
            line["rescored top 10"] = overlap(truth[1][:, :10], found.indices)
            line["rescored rows"] = found.rescored.double().mean().item()
            said = f"{line['rescored top 10']:>14.3f} {line['rescored rows']:>6,.0f}"
        print(f"{dtype:<8} {layout.row_bytes:>11,} {kept:>11.3f} {within:>13.3f} {error:>16.2e} {said}")
        results.append(line)
    queries, _, _ = encode_rows(raw, store.curvature.whitener, "float32")
    scores, indices = mixed_topk(queries, ideal_code(rows, bits=1), norms, len(store), mixing)
    line = {"dtype": "1 bit", "top 10": overlap(truth[1][:, :10], indices[:, :10])}
    line["within top 50"] = overlap(truth[1][:, :10], indices[:, :50])
    print(f"{'1 bit, ideal':<20} {line['top 10']:>11.3f} {line['within top 50']:>13.3f}")
    results.append(line)
    print(f"written: {save('narrow', results)}")


def rescored(path: Path, dtype: str, queries: torch.Tensor, mixing: float) -> Found:
    """What a scan finds in narrow rows with a float16 copy beside them."""
    with tempfile.TemporaryDirectory() as folder:
        store = trackstar.reencode_store(path, Path(folder) / "store", dtype, wide="float16")
        (found,) = plan_scan(store, select(store), len(queries), 10).run(queries, mixing)
    return found


def ideal_code(rows: torch.Tensor, bits: float) -> torch.Tensor:
    """Rows (N, L, d) as an ideal code keeps them: no code of so many bits a number loses less of white Gaussian ones.

    (1 − D)·y + √(D (1 − D))·σ·noise with D = 4^−bits, σ² the mean square of each row's block: the test channel that
    attains the rate-distortion function.

    Source: Cover and Thomas, Elements of Information Theory, section 10.3.
    """
    lost = 4.0**-bits
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    size = rows.square().mean(2, keepdim=True).sqrt()
    return (1 - lost) * rows + (lost * (1 - lost)) ** 0.5 * size * noise


def overlap(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Share of the wanted indices (Q, k) that are among those found."""
    return (wanted[:, :, None] == found[:, None, :]).any(2).double().mean().item()


if __name__ == "__main__":
    main()
