"""score_topk and mixed_topk against torch.mm: python -m benchmarks.scoring [--threads N] [--rows N].

Results are checked before anything is timed. All contenders take turns in one process; a ratio is the median
of its rounds' ratios, so that a busy machine disturbs both sides alike.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch

import trackstar_kernels as tk
from benchmarks.machine import ceilings, save
from benchmarks.timing import interleaved, ratio
from trackstar_kernels import _C

L, d = 16, 256
BLOCK = 2048  # rows of a block of the blocked product


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
        "blocked": blocked,
        "blocked, tall": blocked_tall,
    }


def check(queries: torch.Tensor, rows: torch.Tensor, k: int) -> None:
    """Raise unless score_topk finds what float64 finds, up to rounding."""
    exact = queries.double() @ rows.double().T
    scores, indices = tk.score_topk(queries, rows, k)
    tolerance = 1e-5 * exact.abs().amax()
    wanted = exact.topk(k).values
    if (exact.gather(1, indices) - wanted).abs().max() > tolerance or (
        scores - wanted
    ).abs().max() > tolerance:
        raise SystemExit(f"score_topk is wrong for Q={len(queries)}, k={k}, {rows.dtype} rows")


def check_mixed(queries: torch.Tensor, rows: torch.Tensor, norms: torch.Tensor) -> None:
    """Raise unless mixed_topk finds what its definition finds, on a few rows."""
    few, few_norms = rows[:200], norms[:200]
    fast, slow = (
        tk.mixed_topk(queries, few, few_norms, 10, 0.9, backend=name)[0] for name in ("cpu", "reference")
    )
    if (fast - slow).abs().max() > 1e-4:
        raise SystemExit(f"mixed_topk is wrong for Q={len(queries)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    N, rounds = arguments.rows, arguments.rounds

    limits = ", ".join(f"{value:.0f} {name}" for name, value in ceilings().items())
    results = []
    blocks = torch.randn(N, L, d)
    rows, half, norms = blocks.flatten(1), blocks.half(), blocks.square().sum(2)
    half_rows = half.flatten(1)
    print(f"{N} rows of {L * d}, {arguments.threads} thread(s), {_C.isa()}; {limits}")
    print("\nscore_topk; ratio to the best form of torch.mm on float32 rows, without a top-k")
    print(f"{'Q':>4} {'k':>4} {'rows':>8} {'ms':>8} {'ratio':>6} {'GFLOP/s':>8} {'GB/s':>6}   best torch.mm")
    for Q in (1, 8, 32, 128):
        queries = torch.randn(Q, L * d)
        cases = [(k, r) for k in (10, 100) for r in (rows, half_rows)]
        for k, r in cases:
            check(queries, r, k)
        calls = {
            (k, r.dtype): lambda k=k, r=r, queries=queries: tk.score_topk(queries, r, k) for k, r in cases
        }
        seconds = interleaved({**calls, **products(queries, rows)}, rounds)
        best = min(
            (name for name in seconds if isinstance(name, str)), key=lambda name: median(seconds[name])
        )
        for k, r in cases:
            mine = seconds[k, r.dtype]
            time_ = median(mine)
            case = {"op": "score_topk", "Q": Q, "k": k, "rows": str(r.dtype), "seconds": time_}
            results.append(case | {"baseline": best, "ratio": ratio(mine, seconds[best])})
            print(
                f"{Q:>4} {k:>4} {str(r.dtype).removeprefix('torch.'):>8} {1e3 * time_:>8.1f}"
                f" {ratio(mine, seconds[best]):>6.2f} {2e-9 * Q * r.numel() / time_:>8.0f}"
                f" {1e-9 * r.nbytes / time_:>6.1f}   {1e3 * median(seconds[best]):.1f} ms, {best}"
            )

    print(f"\nmixed_topk, {L} blocks of {d}, λ = 0.9, k = 10; ratio to score_topk of the same rows")
    print(f"{'Q':>4} {'rows':>8} {'ms':>8} {'ratio':>6}")
    for Q in (1, 8, 32, 128, 256):
        queries = torch.randn(Q, L, d)
        check_mixed(queries, blocks, norms)
        for r in (blocks, half):
            seconds = interleaved(
                {
                    "plain": lambda q=queries, r=r: tk.score_topk(q, r, 10),
                    "mixed": lambda q=queries, r=r: tk.mixed_topk(q, r, norms, 10, 0.9),
                },
                rounds,
            )
            case = {"op": "mixed_topk", "Q": Q, "k": 10, "rows": str(r.dtype), "baseline": "score_topk"}
            times = {"seconds": median(seconds["mixed"]), "ratio": ratio(seconds["mixed"], seconds["plain"])}
            results.append(case | times)
            print(
                f"{Q:>4} {str(r.dtype).removeprefix('torch.'):>8} {1e3 * median(seconds['mixed']):>8.1f}"
                f" {ratio(seconds['mixed'], seconds['plain']):>6.2f}"
            )
    print(f"written: {save('scoring', results)}")


if __name__ == "__main__":
    main()
