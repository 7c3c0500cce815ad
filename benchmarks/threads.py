"""What a second thread brings: ``python -m benchmarks.threads [--rounds N]``.

The pass of a store's build, rows under the exact correction, over ragged examples of case A. Each number of threads has
a process of its own, as a build has; they take turns, so only one works at a time. Wall clock.
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median

import torch
import transformers
from trackstar.gradients.collector import GradientCollector
from trackstar.gradients.examples import Encoded
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.passes import rows_of
from trackstar.optimizer.second_moments import SecondMoments

from benchmarks.machine import save
from benchmarks.models import CASES
from benchmarks.timing import ratio

EXAMPLES = 24
LENGTHS = (16, 256)  # shortest and longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    servers = {threads: start(threads) for threads in arguments.threads}
    seconds = {threads: [] for threads in servers}
    for _ in range(arguments.rounds):
        for threads, server in servers.items():
            seconds[threads].append(ask(server))
    for server in servers.values():
        server.stdin.close()
        server.wait()
    lines = []
    print(
        f"{EXAMPLES} examples of {LENGTHS[0]} to {LENGTHS[1]} tokens, {CASES['A'].description.split(',')[0]}"
    )
    for threads, measured in seconds.items():
        speedup = 1 / ratio(measured, seconds[arguments.threads[0]])
        print(f"{threads} thread(s) {median(measured):>8.3f} s {speedup:>6.2f}×")
        lines.append({"threads": threads, "seconds": median(measured), "speedup": speedup})
    print(f"written: {save('threads', lines)}")


def start(threads: int) -> subprocess.Popen:
    """A process that runs the pass on so many threads whenever it is sent a line, and answers with its seconds."""
    command = [sys.executable, "-m", "benchmarks.threads", "--serve", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    ask(server)  # not counted
    return server


def ask(server: subprocess.Popen) -> float:
    server.stdin.write("\n")
    server.stdin.flush()
    return float(server.stdout.readline())


def serve(threads: int) -> None:
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    case = CASES["A"]
    model, examples = case.model(), ragged(case.config["vocab_size"])
    second = SecondMoments.estimate(model, [{"input_ids": examples[0].tokens.tolist()}])
    collector = GradientCollector(model, correction=second.correction("exact"))
    one = LeanPass(model, collector.modules.values())
    for _ in sys.stdin:
        began = time.perf_counter()
        rows_of(one, examples, collector)
        print(time.perf_counter() - began, flush=True)


def ragged(vocabulary: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    shortest, longest = LENGTHS
    lengths = torch.randint(shortest, longest + 1, (EXAMPLES,), generator=generator).tolist()
    rows = [torch.randint(0, vocabulary, (n,), generator=generator).int().numpy() for n in lengths]
    return [Encoded(str(i), "", row, row) for i, row in enumerate(rows)]


if __name__ == "__main__":
    main()
