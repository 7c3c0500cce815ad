"""Builds that run, and die, in forked children: a server imports this module once, a try costs a fork."""

import functools
import multiprocessing
import os
import signal
from pathlib import Path

import torch
from conftest import make_examples, make_llama
from trackstar import SketchSpec
from trackstar.build import build_store

SPEC = SketchSpec(sketch=4)
LENGTHS = (5, 9, 17, 3, 30, 2, 12, 1, 0)
SHARD_ROWS = 3

# Some versions of Python seek what a forkserver is to preload on PYTHONPATH alone, or do without.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["killable"])


@functools.cache
def tiny_model():
    torch.manual_seed(0)
    return make_llama(num_hidden_layers=1).eval()


# Only what starts no thread may happen before a fork: the model and the compiled projections.
torch.set_num_threads(1)
tiny_model()
SPEC.projections("", 1, 1)


def tiny_build(path, **changes):
    """A store of three shards."""
    arguments = {"spec": SPEC, "shard_rows": SHARD_ROWS} | changes
    examples = [{**example, "text": f"text {i} é"} for i, example in enumerate(make_examples(LENGTHS))]
    return build_store(path, tiny_model(), examples, **arguments)


def build_to_death(path, step=None, changes=()):
    """Build, killed before the ``step``-th file or folder gets its final name (never, if None).

    Nothing is synced: that protects from a power failure, and a killed process loses no page that it wrote.
    """
    left = step
    rename, replace = os.rename, os.replace

    def or_die(act):
        def counted(*arguments):
            nonlocal left
            if left is not None:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return act(*arguments)

        return counted

    os.fsync, os.rename, os.replace = lambda handle: None, or_die(rename), or_die(replace)
    tiny_build(path, **dict(changes))


def start(target, *arguments):
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    return process


def finish(process):
    """Exit code of a child, which has a minute."""
    process.join(60)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode
