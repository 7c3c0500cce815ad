"""Builds that run, and die, in forked children: a server imports this module once, a try costs a fork."""

import functools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch
import trackstar
from conftest import make_examples, make_llama
from trackstar import SketchSpec
from trackstar.storage.build import build_store
from trackstar.storage.manifest import Manifest
from trackstar.storage.writer import writing

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


def documents(count, seed):
    return [
        {**example, "text": f"{seed}/{i} é", "metadata": {"seed": seed}}
        for i, example in enumerate(make_examples(LENGTHS[:count], seed))
    ]


def prepare(root):
    """Two stores that can be merged: what the operations work on."""
    arguments = {"spec": SPEC, "shard_rows": SHARD_ROWS, "dtype": "float16"}
    first = build_store(root / "first", tiny_model(), documents(7, 0), **arguments)
    second = build_store(
        root / "second", tiny_model(), documents(5, 1), curvature=first.curvature, **arguments
    )
    trackstar.delete_rows(second.path, [1])


OPERATIONS = {
    "build": lambda root: tiny_build(root / "new", dtype="int8", wide="float16"),
    "append": lambda root: trackstar.append_store(root / "first", tiny_model(), documents(8, 2)),
    "delete": lambda root: trackstar.delete_rows(root / "first", [0, 4, 5]),
    "merge": lambda root: trackstar.merge_stores(root / "new", [root / "first", root / "second"]),
    "reencode": lambda root: trackstar.reencode_store(root / "second", root / "new", "int8", wide="float16"),
    "rewhiten": lambda root: trackstar.rewhiten_store(root / "second", root / "new"),
}
"""{name: what is done with the stores that :func:`prepare` left below a folder}."""


def versions(root):
    """{store: rows committed, rows that readers see, rows deleted} of the stores below, all of which are intact."""
    found = {}
    for path in sorted(root.iterdir()):
        manifest = Manifest.read(path)
        if manifest is not None:
            store = trackstar.open_store(path)
            assert trackstar.verify_store(store) == []
            seen = (store.end, len(store.deleted)) if store.complete else (0, 0)
            found[path.name] = manifest.committed, *seen
    return found


def operate_to_death(name, root, step=None):
    """An operation, killed before the ``step``-th thing it asks of the file system (never, if None).

    Where new files are synced, nothing is done: that protects from a power failure, and a killed process loses no page
    that it wrote. But it is a moment to die at.
    """
    count_down(step, "fsync", "rename", "replace", "link", "mkdir", "unlink", "rmdir")
    OPERATIONS[name](root)


def operate_slowly(name, root):
    """An operation whose commits take long."""
    replace = os.replace

    def slowly(*arguments):
        time.sleep(0.1)
        replace(*arguments)
        time.sleep(0.1)

    os.fsync, os.replace = lambda handle: None, slowly
    OPERATIONS[name](root)


def hold_the_lock(path, begun, may_end):
    """Write to a store, and take until ``may_end`` about it."""
    with writing(path):
        begun.set()
        may_end.wait(60)


def build_to_death(path, step=None, changes=()):
    """Build, killed before the ``step``-th file or folder gets its final name (never, if None)."""
    count_down(step, "rename", "replace")
    os.fsync = lambda handle: None
    tiny_build(path, **dict(changes))


def count_down(step, *names):
    """Kill this process when functions of ``os`` have been called ``step`` times altogether."""
    left = step

    def or_die(act):
        @functools.wraps(act)
        def counted(*arguments, **options):
            nonlocal left
            if left is not None:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return act(*arguments, **options)

        return counted

    for name in names:
        setattr(os, name, or_die((lambda handle: None) if name == "fsync" else getattr(os, name)))


def start(target, *arguments):
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    return process


def finish(process):
    """Exit code of a child, which has a minute."""
    process.join(60)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode
