"""Scans of int8, int4 and sign rows, time alone: ``python -m benchmarks.codes [--isa I] [--rows N] [--only TABLE …]``.

Rows are 20,000 × 4,096 random numbers, 16 blocks of 256. Beside each scan the best of several forms of torch.mm on the
float32 rows, without a selection; for one query, reading the codes and doing nothing; for sign rows FAISS's
IndexRaBitQFastScan with as many bits, where faiss-cpu is installed, and one scale a row as it has. Results are checked
before anything is timed. All contenders take turns in one process; a ratio is the median of its rounds' ratios.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable
from statistics import median

import torch

import trackstar_kernels as tk
from benchmarks.machine import ceilings, read_rows, save
from benchmarks.scoring import L, d, fastest, products
from benchmarks.targets import compare
from benchmarks.timing import interleaved, ratio
from trackstar_kernels import _C

DTYPES = ("int8", "int4", "sign")
QUERIES = (1, 2, 4, 8, 16, 32, 128)
WIDER_QUERIES = (8, 32, 128)
THREADED_QUERIES = (1, 8, 32, 128)

Encoded = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # codes, scales, squared norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=_C.available_isas(), default=_C.isa(), help="level of the kernels")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=11)
    tables = {"plain": plain, "wider": wider, "signs": signs, "mixed": mixed, "threads": threaded}
    parser.add_argument("--only", choices=tables, nargs="+", help="these tables alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _C.set_isa(arguments.isa)
    limits = ", ".join(f"{value:.0f} {name}" for name, value in ceilings().items())
    print(f"{arguments.rows} rows of {L} × {d}, one thread, {_C.isa()}; {limits}")
    rows = torch.randn(arguments.rows, L, d)
    encoded = {dtype: tk.encode_rows(rows, None, dtype) for dtype in DTYPES}
    reached: dict[str, float] = {}
    lines = {}
    for name in arguments.only or tables:
        lines[name] = tables[name](rows, encoded, arguments.rounds, reached)
    lines["targets"] = compare(reached)
    print(f"written: {save('codes', lines)}")


def plain(
    rows: torch.Tensor, encoded: Encoded, rounds: int, reached: dict[str, float]
) -> list[dict[str, object]]:
    """k = 10, exact among the decoded rows."""
    print("\nscore_topk, k = 10; ÷ the best form of torch.mm on float32 rows; share of reading the codes")
    print(f"{'Q':>4} {'rows':>5} {'bytes a row':>11} {'ms':>8} {'÷ mm':>6} {'GB/s':>6} {'of read':>7}")
    lines = []
    for Q in QUERIES:
        queries = torch.randn(Q, L, d)
        forms = products(queries.flatten(1), rows.flatten(1))
        runs: dict[object, Callable[[], object]] = dict(forms)
        for dtype, (codes, scales, _) in encoded.items():
            check(queries, codes, scales)
            runs[dtype] = functools.partial(tk.score_topk, queries, codes, 10, scales=scales)
            if Q == 1:
                for streams in (1, 4, 8):
                    runs[dtype, streams] = functools.partial(read_rows, codes, streams)
        seconds = interleaved(runs, rounds)
        best = fastest(seconds, forms)
        for dtype, (codes, scales, _) in encoded.items():
            bytes_ = codes.nbytes + scales.nbytes
            line = {"Q": Q, "rows": dtype, "seconds": median(seconds[dtype]), "baseline": best}
            line |= {"bytes a row": bytes_ // len(codes), "÷ mm": ratio(seconds[dtype], seconds[best])}
            share = ""
            if Q == 1:
                reading = fastest(seconds, [(dtype, streams) for streams in (1, 4, 8)])
                line["of read"] = ratio(seconds[reading], seconds[dtype])
                share = f"{line['of read']:.2f}"
                if dtype == "int8":
                    reached["int8 ÷ reading them, Q = 1"] = 1 / line["of read"]
            print(
                f"{Q:>4} {dtype:>5} {line['bytes a row']:>11,} {1e3 * line['seconds']:>8.2f} {line['÷ mm']:>6.3f}"
                f" {1e-9 * bytes_ / line['seconds']:>6.1f} {share:>7}",
                flush=True,
            )
            lines.append(line)
    return lines


def wider(
    rows: torch.Tensor, encoded: Encoded, rounds: int, reached: dict[str, float]
) -> list[dict[str, object]]:
    """The float16 rows' answer, found through int8 codes."""
    print("\nrescored_topk, k = 10: float16 rows' answer, found through codes")
    print(f"{'Q':>4} {'rows':>5} {'ms':>8} {'÷ mm':>6} {'÷ float16':>9} {'rows rescored a query':>21}")
    half, lines = rows.half(), []
    for Q in WIDER_QUERIES:
        queries = torch.randn(Q, L, d)
        forms = products(queries.flatten(1), rows.flatten(1))
        runs: dict[object, Callable[[], object]] = dict(forms)
        runs["float16"] = functools.partial(tk.score_topk, queries, half, 10)
        counts = {}
        for dtype in ("int8",) if Q > 8 else DTYPES:
            codes, scales, norms = encoded[dtype]
            run = functools.partial(tk.rescored_topk, queries, codes, half, norms, 10, scales=scales)
            scores, indices, rescored = run()
            wanted = tk.score_topk(queries[:1], half, 10)
            if not (torch.equal(scores[:1], wanted[0]) and torch.equal(indices[:1], wanted[1])):
                raise SystemExit(f"rescored_topk is wrong for Q={Q}, {dtype}")
            runs[dtype], counts[dtype] = run, rescored.double().mean().item()
        seconds = interleaved(runs, max(3, rounds // 2))
        best = fastest(seconds, forms)
        for dtype, count in counts.items():
            line = {"Q": Q, "rows": dtype, "seconds": median(seconds[dtype]), "rescored": count}
            line |= {"÷ mm": ratio(seconds[dtype], seconds[best])}
            line |= {"÷ float16": ratio(seconds[dtype], seconds["float16"])}
            print(
                f"{Q:>4} {dtype:>5} {1e3 * line['seconds']:>8.2f} {line['÷ mm']:>6.3f} {line['÷ float16']:>9.3f}"
                f" {count:>21,.0f}",
                flush=True,
            )
            if dtype == "int8":
                reached[f"int8 with rescoring ÷ best mm, Q = {Q}"] = line["÷ mm"]
            lines.append(line)
    return lines


def signs(
    rows: torch.Tensor, encoded: Encoded, rounds: int, reached: dict[str, float]
) -> list[dict[str, object]]:
    """Sign rows beside FAISS."""
    if importlib.util.find_spec("faiss") is None:
        print("\nsign rows beside FAISS: faiss-cpu is not installed")
        return []
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexRaBitQFastScan(L * d, faiss.METRIC_INNER_PRODUCT)
    flat = rows.flatten(1).numpy()
    index.train(flat[:1000])
    index.add(flat)
    whole, whole_scales, _ = tk.encode_rows(rows.flatten(1)[:, None], None, "sign")
    blocks, scales, _ = encoded["sign"]
    print(
        f"\nsign rows, k = 10; ÷ FAISS {faiss.__version__}'s IndexRaBitQFastScan, {index.code_size} bytes a row"
    )
    print(f"{'Q':>4} {'scales a row':>12} {'ms':>8} {'÷ FAISS':>8}")
    lines = []
    for Q in QUERIES:
        queries = torch.randn(Q, L * d)
        blocked = queries.view(Q, L, d)
        check(queries[:, None], whole, whole_scales)
        runs = {
            1: functools.partial(tk.score_topk, queries[:, None], whole, 10, scales=whole_scales),
            L: functools.partial(tk.score_topk, blocked, blocks, 10, scales=scales),
            "faiss": functools.partial(index.search, queries.numpy(), 10),
        }
        seconds = interleaved(runs, rounds)
        for count in (1, L):
            line = {"Q": Q, "scales": count, "seconds": median(seconds[count])}
            line["÷ FAISS"] = ratio(seconds[count], seconds["faiss"])
            print(f"{Q:>4} {count:>12} {1e3 * line['seconds']:>8.2f} {line['÷ FAISS']:>8.3f}", flush=True)
            lines.append(line)
        name = "sign ÷ FAISS, worst Q"
        reached[name] = max(reached.get(name, 0), lines[-2]["÷ FAISS"])
    return lines


def mixed(
    rows: torch.Tensor, encoded: Encoded, rounds: int, reached: dict[str, float]
) -> list[dict[str, object]]:
    """The task-mixed form, its task prepared beforehand."""
    print("\nmixed_topk, λ = 0.9, k = 10; ÷ that of float16 rows")
    print(f"{'Q':>4} {'rows':>5} {'ms':>8} {'÷ float16':>9}")
    half, norms = rows.half(), encoded["int8"][2]
    lines = []
    for Q in (1, 8, 32, 128):
        task = tk.scoring.prepare_task(torch.randn(Q, L, d), 0.9)
        runs = {"float16": functools.partial(task.topk, half, norms, 10)}
        for dtype, (codes, scales, _) in encoded.items():
            runs[dtype] = functools.partial(task.topk, codes, norms, 10, scales=scales)
        seconds = interleaved(runs, max(3, rounds // 2))
        for dtype in DTYPES:
            line = {"Q": Q, "rows": dtype, "seconds": median(seconds[dtype])}
            line["÷ float16"] = ratio(seconds[dtype], seconds["float16"])
            print(f"{Q:>4} {dtype:>5} {1e3 * line['seconds']:>8.2f} {line['÷ float16']:>9.3f}", flush=True)
            lines.append(line)
    return lines


def threaded(
    rows: torch.Tensor, encoded: Encoded, rounds: int, reached: dict[str, float]
) -> list[dict[str, object]]:
    """Two threads, by the clock on the wall."""
    print("\ntwo threads ÷ one")
    print(f"{'Q':>4} {'rows':>5} {'one ms':>8} {'two ms':>8} {'ratio':>6}")
    lines = []
    for Q in THREADED_QUERIES:
        queries = torch.randn(Q, L, d)
        for dtype, (codes, scales, _) in encoded.items():
            runs = {count: functools.partial(on_threads, count, queries, codes, scales) for count in (1, 2)}
            torch.set_num_threads(2)  # which makes the clock the wall's
            seconds = interleaved(runs, rounds)
            torch.set_num_threads(1)
            line = {"Q": Q, "rows": dtype, "one": median(seconds[1]), "two": median(seconds[2])}
            line["ratio"] = ratio(seconds[2], seconds[1])
            print(
                f"{Q:>4} {dtype:>5} {1e3 * line['one']:>8.2f} {1e3 * line['two']:>8.2f} {line['ratio']:>6.3f}",
                flush=True,
            )
            lines.append(line)
    reached["narrow rows, two threads ÷ one, worst"] = max(line["ratio"] for line in lines)
    return lines


def on_threads(count: int, queries: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """One scan on so many threads."""
    torch.set_num_threads(count)
    tk.score_topk(queries, codes, 10, scales=scales)
    torch.set_num_threads(2)


def check(queries: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Raise unless score_topk finds what float64 finds among the decoded rows, up to rounding."""
    scores, indices = tk.score_topk(queries, codes, 10, scales=scales)
    exact = torch.zeros(len(queries), len(codes), dtype=torch.float64)
    for b in range(queries.shape[1]):
        block = tk.decode_rows(codes[:, b : b + 1], scales[:, b : b + 1], queries.shape[2])[:, 0]
        exact += (queries[:, b] @ block.T).double()
    tolerance = 1e-5 * exact.abs().amax()
    if (scores - exact.topk(10).values).abs().max() > tolerance or (
        scores - exact.gather(1, indices)
    ).abs().max() > tolerance:
        raise SystemExit(f"score_topk is wrong for Q={len(queries)}, {codes.dtype} codes")


if __name__ == "__main__":
    main()
