"""Work on stores that is killed: nothing committed is lost, and the same call again ends as if nothing had happened."""

import itertools
import os
import random
import shutil
import time
from pathlib import Path

import killable
import pytest
import torch
import trackstar
from conftest import files_below
from killable import OPERATIONS, finish, operate_to_death, start, versions

MAKING = {"build", "merge", "reencode", "rewhiten"}
"""Operations that make a store of their own and leave the others as they are."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What the operations work on."""
    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        killable.prepare(root)
    return root


@pytest.fixture(scope="module")
def done(tmp_path_factory, prepared):
    """{operation: files once it has been done without trouble}, by way of a child, as those to compare with are."""

    def files(name):
        root = copied(prepared, tmp_path_factory.mktemp(name) / "root")
        assert finish(start(operate_to_death, name, root)) == 0
        return files_below(root)

    found = {}
    return lambda name: found.setdefault(name, files(name)) if name not in found else found[name]


def copied(prepared, root):
    """The prepared stores, sharing their files, which nothing may ever write to."""
    return Path(shutil.copytree(prepared, root, copy_function=os.link))


def assert_kept(name, before, after, last):
    """That a store lost nothing, and that readers see what was there before or what there is in the end."""
    for store, (committed, seen, deleted) in before.items():
        assert after[store][0] >= committed
        assert after[store][1:] in ((seen, deleted), last[store][1:])
    if name in MAKING:
        # New stores are seen once they are whole.
        assert after.get("new", (0, 0))[1] in (0, last["new"][1])


def assert_sources_intact(name, prepared, root):
    if name in MAKING:
        for store in ("first", "second"):
            assert files_below(root / store) == files_below(prepared / store)


def kill_and_go_on(name, prepared, root, step, files, last):
    """Whether an operation outlived ``step``; it is done afterwards in any case."""
    copied(prepared, root)
    before = versions(root)
    code = finish(start(operate_to_death, name, root, step))
    assert code in (0, -9)
    after = versions(root)
    assert_kept(name, before, after, last)
    assert_sources_intact(name, prepared, root)
    if code:
        assert finish(start(operate_to_death, name, root)) == 0
    assert files_below(root) == files
    return code == 0


def last_versions(tmp_path, name, prepared):
    root = copied(prepared, tmp_path / "last")
    assert finish(start(operate_to_death, name, root)) == 0
    return versions(root)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "build"])
def test_killed_now_and_then(tmp_path, prepared, done, name):
    """At every forty-first thing that an operation asks of the file system."""
    last = last_versions(tmp_path, name, prepared)
    for step in itertools.count(5, 41):
        root = tmp_path / str(step)
        if kill_and_go_on(name, prepared, root, step, done(name), last):
            break
        shutil.rmtree(root)
    assert step > 5


@pytest.mark.slow
def test_killed_at_two_hundred_points(tmp_path, prepared, done):
    """At every seventh thing that any operation asks of the file system."""
    kills = 0
    for name in OPERATIONS:
        last = last_versions(tmp_path / name, name, prepared)
        for step in itertools.count(3, 7):
            root = tmp_path / name / str(step)
            if kill_and_go_on(name, prepared, root, step, done(name), last):
                break
            shutil.rmtree(root)
            kills += 1
    assert kills >= 200


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_random_moments_again_and_again(tmp_path, prepared, done, name):
    """The same store is killed until it is whole; what is committed never becomes less."""
    last = last_versions(tmp_path, name, prepared)
    moments = random.Random(0)
    began = time.monotonic()
    finish(start(operate_to_death, name, copied(prepared, tmp_path / "timed")))
    duration = time.monotonic() - began
    kills = 0
    for number in itertools.count():
        root = copied(prepared, tmp_path / f"try-{number}")
        seen = versions(root)
        finished = False
        while not finished:
            child = start(operate_to_death, name, root)
            time.sleep(moments.uniform(0, duration))
            child.kill()
            finished = finish(child) == 0
            kills += not finished
            now = versions(root)
            assert_kept(name, seen, now, last)
            seen = now
        assert files_below(root) == done(name)
        shutil.rmtree(root)
        if kills >= 40:
            return


@pytest.mark.parametrize("name", ["append", "delete"])
def test_readers_see_one_version_while_a_writer_works(tmp_path, prepared, done, name):
    """Opened before or in between, a store gives the rows and answers of the version before, or of the one after."""
    root = copied(prepared, tmp_path / "root")
    early = trackstar.open_store(root / "first")
    queries = torch.randn(2, *early.row_shape, generator=torch.Generator().manual_seed(0))

    def answers(store):
        from trackstar.scoring.attribution import score_rows

        scores, indices, _ = score_rows(store, queries, k=4, mixing=0.5)
        return len(store), store.end, store.rows(0, store.end), scores, indices

    def same(got, wanted):
        return got[:2] == wanted[:2] and all(map(torch.equal, got[2:], wanted[2:]))

    after_root = copied(prepared, tmp_path / "after")
    assert finish(start(operate_to_death, name, after_root)) == 0
    before, after = answers(early), answers(trackstar.open_store(after_root / "first"))
    assert not same(before, after)
    writer = start(killable.operate_slowly, name, root)
    seen = []
    while writer.is_alive():
        got = answers(trackstar.open_store(root / "first"))
        assert same(got, before) or same(got, after)
        seen.append(same(got, after))
        assert same(answers(early), before)
    assert finish(writer) == 0
    assert seen[0] is False
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert same(answers(early), before)
    assert same(answers(trackstar.open_store(root / "first")), after)


@pytest.mark.parametrize("name", ["append", "delete"])
def test_two_writers(tmp_path, prepared, name):
    root = copied(prepared, tmp_path / "root")
    begun, may_end = killable.FORKS.Event(), killable.FORKS.Event()
    first = start(killable.hold_the_lock, root / "first", begun, may_end)
    assert begun.wait(60)
    with pytest.raises(
        trackstar.StoreError, match=rf"another process is writing to the store at {root}/first"
    ):
        OPERATIONS[name](root)
    may_end.set()
    assert finish(first) == 0
    assert versions(root) == versions(prepared)
