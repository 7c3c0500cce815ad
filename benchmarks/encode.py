"""Narrowing rows: ``python -m benchmarks.encode [--isa I] [--rows N] [--threads T]``.

Rows are random numbers, blocks of 256. Beside encode_rows in every dtype: its PyTorch reference, copying the rows, and
whitening them alone. int4's codes of both backends are compared before anything is timed. All contenders take turns in
one process; a rate is the rows' numbers by the median of the rounds.
"""

import argparse
import functools
from collections.abc import Callable
from statistics import median

import torch

import trackstar_kernels as tk
from benchmarks.machine import ceilings, save
from benchmarks.timing import interleaved, ratio
from trackstar_kernels import _C
from trackstar_kernels.encode import DTYPES

L, d = 16, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=_C.available_isas(), default=_C.isa(), help="level of the kernels")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    _C.set_isa(arguments.isa)
    rows, whiteners = torch.randn(arguments.rows, L, d), torch.randn(L, d, d)
    codes = [tk.encode_rows(rows, None, "int4", backend=backend)[0] for backend in ("cpu", "reference")]
    assert torch.equal(*codes), "the backends' codes of int4 differ"
    runs: dict[str, Callable[[], object]] = {"copy": rows.clone}
    runs["whitened"] = functools.partial(tk.encode_rows, rows, whiteners, "float32")
    for dtype in DTYPES:
        runs[dtype] = functools.partial(tk.encode_rows, rows, None, dtype)
        runs[f"{dtype}, reference"] = functools.partial(
            tk.encode_rows, rows, None, dtype, backend="reference"
        )
    seconds = interleaved(runs, arguments.rounds)
    limits = ", ".join(f"{value:.0f} {name}" for name, value in ceilings().items())
    print(f"{arguments.rows} rows of {L} × {d}, threads: {arguments.threads}, {_C.isa()}; {limits}")
    print(f"{'':<20} {'million numbers/s':>17} {'÷ whitening':>11}")
    lines = []
    for name, taken in seconds.items():
        line = {"run": name, "numbers/s": rows.numel() / median(taken)}
        line["÷ whitening"] = ratio(taken, seconds["whitened"])
        print(f"{name:<20} {line['numbers/s'] / 1e6:>17,.0f} {line['÷ whitening']:>11.2f}")
        lines.append(line)
    print(f"written: {save('encode', lines)}")


if __name__ == "__main__":
    main()
