"""score_topk and mixed_topk beside torch.mm, memory and each other: ``python -m benchmarks.scoring [--isa I]``.

Stored rows are 20,000 × 4,096, 16 blocks of 256. Beside each result the best of several forms of torch.mm on float32
rows, without a selection; for one query, reading the rows and doing nothing. Results are checked against their
definitions before anything is timed. All contenders take turns in one process; a ratio is the median of its rounds'
ratios, so that a busy machine disturbs both sides alike.
"""

import argparse
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch
from torch.nn.functional import linear

import trackstar_kernels as tk
from benchmarks.machine import ceilings, read_rows, save
from benchmarks.targets import compare
from benchmarks.timing import interleaved, ratio
from trackstar_kernels import _C

L, d = 16, 256
BLOCK = 2048  # rows of a block of the blocked products
QUERIES = (1, 2, 4, 8, 16, 32, 128, 512)
MIXED_QUERIES = (1, 4, 8, 32, 128, 256)
THREADED_QUERIES = (1, 8, 32, 128)
RESULTS = (10, 100, 1000, 10_000)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Stored = dict[torch.dtype, torch.Tensor]  # the same rows (N, L, d)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=_C.available_isas(), default=_C.isa(), help="level of the kernels")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--only", choices=("plain", "k", "mixed", "threads"), nargs="+", help="these tables alone"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _C.set_isa(arguments.isa)
    limits = ", ".join(f"{value:.0f} {name}" for name, value in ceilings().items())
    print(f"{arguments.rows} rows of {L} × {d}, one thread, {_C.isa()}; {limits}")
    rows = torch.randn(arguments.rows, L, d)
    stored = {dtype: rows.to(dtype) for dtype in DTYPES}
    tables = {"plain": plain, "k": many_results, "mixed": mixed, "threads": threaded}
    reached: dict[str, float] = {}
    lines = {}
    for name in arguments.only or tables:
        lines[name] = tables[name](stored, arguments.rounds, reached)
    lines["targets"] = compare(reached)
    print(f"written: {save('scoring', lines)}")


def plain(stored: Stored, rounds: int, reached: dict[str, float]) -> list[dict[str, object]]:
    """k = 10; every dtype."""
    print(
        "\nscore_topk, k = 10; ÷ the best form of torch.mm on float32 rows; share of reading the same bytes"
    )
    print(
        f"{'Q':>4} {'rows':>8} {'ms':>8} {'÷ mm':>6} {'GFLOP/s':>8} {'GB/s':>6} {'of read':>7}   best torch.mm"
    )
    lines = []
    rows = stored[torch.float32]
    for Q in QUERIES:
        queries = torch.randn(Q, L, d)
        runs: dict[object, Callable[[], object]] = dict(products(queries.flatten(1), rows.flatten(1)))
        for dtype, same in stored.items():
            check(queries, same, 10)
            runs[dtype] = functools.partial(score, queries, same, 10)
            if Q <= 4:
                for streams in (1, 4, 8):
                    runs[dtype, streams] = functools.partial(read_rows, same, streams)
        seconds = interleaved(runs, rounds if Q < 512 else max(3, rounds // 2))
        best = fastest(seconds, products(queries.flatten(1), rows.flatten(1)))
        for dtype, same in stored.items():
            line = {"Q": Q, "rows": name_of(dtype), "seconds": median(seconds[dtype])}
            line |= {"baseline": best, "÷ mm": ratio(seconds[dtype], seconds[best])}
            share = ""
            if Q <= 4:
                reading = fastest(seconds, [(dtype, streams) for streams in (1, 4, 8)])
                line["of read"] = ratio(seconds[reading], seconds[dtype])
                share = f"{line['of read']:.2f}"
            rates = [2e-9 * Q * same.numel() / line["seconds"], 1e-9 * same.nbytes / line["seconds"]]
            print(
                f"{Q:>4} {line['rows']:>8} {1e3 * line['seconds']:>8.2f} {line['÷ mm']:>6.3f}"
                f" {rates[0]:>8.0f} {rates[1]:>6.1f} {share:>7}   {1e3 * median(seconds[best]):.1f} ms, {best}",
                flush=True,
            )
            lines.append(line)
        if Q == 1:
            for line in lines[-3:-1]:
                reached[f"{line['rows']} ÷ reading them, Q = 1"] = 1 / line["of read"]
        elif Q > 2:
            reached[f"float32 ÷ best mm, Q = {Q}"] = lines[-3]["÷ mm"]
        reached["float16 ÷ float32, worst Q"] = max(
            reached.get("float16 ÷ float32, worst Q", 0),
            ratio(seconds[torch.float16], seconds[torch.float32]),
        )
    return lines


def many_results(stored: Stored, rounds: int, reached: dict[str, float]) -> list[dict[str, object]]:
    """How the number of results tells."""
    print("\nscore_topk, float32 rows; ÷ k = 10")
    print(f"{'Q':>4} {'k':>6} {'ms':>8} {'÷ k=10':>7}")
    lines = []
    rows = stored[torch.float32]
    for Q in (1, 32, 128):
        queries = torch.randn(Q, L, d)
        for k in RESULTS:
            check(queries, rows, k)
        seconds = interleaved({k: functools.partial(score, queries, rows, k) for k in RESULTS}, rounds)
        for k in RESULTS:
            line = {"Q": Q, "k": k, "seconds": median(seconds[k]), "÷ k=10": ratio(seconds[k], seconds[10])}
            print(f"{Q:>4} {k:>6} {1e3 * line['seconds']:>8.2f} {line['÷ k=10']:>7.3f}", flush=True)
            lines.append(line)
        if Q == 1:  # more queries compute few scores exactly, the fewer the fewer results are wanted
            reached["k = 100 ÷ k = 10, Q = 1"] = ratio(seconds[100], seconds[10])
    return lines


def mixed(stored: Stored, rounds: int, reached: dict[str, float]) -> list[dict[str, object]]:
    """The task-mixed form, its task prepared beforehand, beside the plain one in the same tile loop."""
    print(
        f"\nmixed_topk, {L} blocks of {d}, λ = 0.9, k = 10; ÷ score_topk of the same rows, so few at a time that all"
        " are multiplied as floats"
    )
    print(f"{'Q':>4} {'rows':>8} {'ms':>8} {'÷ plain':>7} {'prepare ms':>10}")
    lines = []
    norms = stored[torch.float32].square().sum(2)
    for Q in MIXED_QUERIES:
        queries = torch.randn(Q, L, d)
        for dtype, rows in stored.items():
            if dtype == torch.bfloat16:
                continue
            check_mixed(queries, rows, norms)
            task = tk.scoring.prepare_task(queries, 0.9)
            seconds = interleaved(
                {
                    "plain": functools.partial(score_as_floats, queries, rows),
                    "mixed": functools.partial(task.topk, rows, norms, 10),
                    "prepare": functools.partial(tk.scoring.prepare_task, queries, 0.9),
                },
                rounds,
            )
            line = {"Q": Q, "rows": name_of(dtype), "seconds": median(seconds["mixed"])}
            line |= {
                "÷ plain": ratio(seconds["mixed"], seconds["plain"]),
                "prepare": median(seconds["prepare"]),
            }
            print(
                f"{Q:>4} {line['rows']:>8} {1e3 * line['seconds']:>8.2f} {line['÷ plain']:>7.3f}"
                f" {1e3 * line['prepare']:>10.2f}",
                flush=True,
            )
            lines.append(line)
        if Q in (8, 32, 128):
            reached[f"mixed ÷ plain, float32, Q = {Q}"] = lines[-2]["÷ plain"]
    return lines


def threaded(stored: Stored, rounds: int, reached: dict[str, float]) -> list[dict[str, object]]:
    """Two threads beside one, by the clock on the wall."""
    print("\nscore_topk, k = 10, float32 rows, two threads")
    print(f"{'Q':>4} {'one ms':>8} {'two ms':>8} {'÷ one':>6} {'reading':>7}")
    lines = []
    rows = stored[torch.float32]
    halves = rows.tensor_split(2)
    torch.set_num_threads(2)  # by which the clock is chosen
    with ThreadPoolExecutor(2) as pool:
        for Q in THREADED_QUERIES:
            queries = torch.randn(Q, L, d)
            seconds = interleaved(
                {
                    1: functools.partial(on_threads, 1, queries, rows),
                    2: functools.partial(on_threads, 2, queries, rows),
                    "read on 1": lambda: read_rows(rows, 4),
                    "read on 2": lambda: list(pool.map(read_rows, halves, (4, 4))),
                },
                rounds,
            )
            line = {"Q": Q, "one": median(seconds[1]), "two": median(seconds[2])}
            line |= {"÷ one": ratio(seconds[2], seconds[1])}
            line |= {"reading": ratio(seconds["read on 2"], seconds["read on 1"])}
            print(
                f"{Q:>4} {1e3 * line['one']:>8.2f} {1e3 * line['two']:>8.2f} {line['÷ one']:>6.3f}"
                f" {line['reading']:>7.3f}",
                flush=True,
            )
            lines.append(line)
    # Fewer queries are bound by memory, which two threads do not read twice as fast: see the last column.
    reached["two threads ÷ one, Q ≥ 32, worst"] = max(line["÷ one"] for line in lines if line["Q"] >= 32)
    torch.set_num_threads(1)
    return lines


def score(queries: torch.Tensor, rows: torch.Tensor, k: int) -> object:
    return tk.score_topk(queries, rows, k)


def score_as_floats(queries: torch.Tensor, rows: torch.Tensor) -> None:
    """Rows in parts that are not worth rounding to bytes first (csrc/cpu/scoring.cpp)."""
    for part in rows.split(2000):
        tk.score_topk(queries, part, 10)


def on_threads(threads: int, queries: torch.Tensor, rows: torch.Tensor) -> object:
    torch.set_num_threads(threads)
    result = tk.score_topk(queries, rows, 10)
    torch.set_num_threads(2)
    return result


def products(queries: torch.Tensor, rows: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Ways to have torch compute all scores and keep none: what exact search has to pay at least."""
    Q, N = len(queries), len(rows)
    wide, tall = torch.empty(Q, N), torch.empty(N, Q)
    block, tall_block = torch.empty(Q, BLOCK), torch.empty(BLOCK, Q)
    columns = queries.T.contiguous()
    whole = [rows[start : start + BLOCK] for start in range(0, N - BLOCK + 1, BLOCK)]
    rest = rows[len(whole) * BLOCK :]

    def blocked() -> None:
        for part in whole:
            torch.mm(queries, part.T, out=block)
        torch.mm(queries, rest.T)

    def blocked_tall() -> None:
        for part in whole:
            torch.mm(part, queries.T, out=tall_block)
        torch.mm(rest, queries.T)

    return {
        "queries @ rows.T": lambda: torch.mm(queries, rows.T, out=wide),
        "rows @ queries.T": lambda: torch.mm(rows, queries.T, out=tall),
        "rows @ columns": lambda: torch.mm(rows, columns, out=tall),
        "linear(rows)": lambda: linear(rows, queries),
        "linear(queries)": lambda: linear(queries, rows),
        "blocked": blocked,
        "blocked, tall": blocked_tall,
    }


def fastest(seconds: dict[object, list[float]], names: Iterable[object]) -> object:
    return min(names, key=lambda name: median(seconds[name]))


def check(queries: torch.Tensor, rows: torch.Tensor, k: int) -> None:
    """Stop unless score_topk finds what float64 finds, up to rounding."""
    wide = queries.double().flatten(1)
    exact = torch.cat([wide @ part.double().flatten(1).T for part in rows.split(BLOCK)], 1)
    scores, indices = tk.score_topk(queries, rows, k)
    wanted = exact.topk(k).values
    error = torch.maximum((exact.gather(1, indices) - wanted).abs().max(), (scores - wanted).abs().max())
    if not error <= 1e-5 * exact.abs().max():
        raise SystemExit(f"score_topk is wrong for Q={len(queries)}, k={k}, {rows.dtype} rows")


def check_mixed(queries: torch.Tensor, rows: torch.Tensor, norms: torch.Tensor) -> None:
    """Stop unless mixed_topk finds what its definition finds, on a few rows."""
    few, few_norms = rows[:200], norms[:200]
    fast, slow = (
        tk.mixed_topk(queries, few, few_norms, 10, 0.9, backend=name)[0] for name in ("cpu", "reference")
    )
    if not (fast - slow).abs().max() <= 1e-4:
        raise SystemExit(f"mixed_topk is wrong for Q={len(queries)}")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
