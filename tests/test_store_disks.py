"""Disks that are full or read-only: one clear error, nothing committed lost, nothing half done left behind."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess

import killable
import pytest
import trackstar
from conftest import files_below
from killable import (
    LENGTHS,
    OPERATIONS,
    SHARD_ROWS,
    build_to_death,
    finish,
    operate_to_death,
    start,
    tiny_build,
    tiny_model,
    versions,
)
from trackstar.scoring.attribution import attribute

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What the operations work on."""
    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        killable.prepare(root)
    return root


@contextlib.contextmanager
def mounted(path, *options):
    """A file system of its own at ``path``."""
    path.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    done = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_disk_that_fills_up(tmp_path, prepared, name):
    """Someone else's file leaves more and more; work ends with one error, or whole."""
    expected = shutil.copytree(prepared, tmp_path / "expected")
    assert finish(start(operate_to_death, name, expected)) == 0
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as disk:
        ballast, root = disk / "ballast", shutil.copytree(prepared, disk / "root")
        outcomes = []
        before = versions(root)
        for free in range(0, 3_000_000, 250_000):
            ballast.write_bytes(b"")
            filled = shutil.disk_usage(disk).free - free
            ballast.write_bytes(bytes(max(filled, 0)))
            outcomes.append(finish(start(full_disk, name, root)))
            now = versions(root)
            assert all(now[store][0] >= before[store][0] for store in before)
            before = now
        # 0: done; 28: ENOSPC. Anything else is a crash, of which the most likely is SIGBUS.
        assert set(outcomes) == {0, errno.ENOSPC}
        assert files_below(root) == files_below(expected)


def full_disk(name, root):
    """Exit with the error's number, after a check that it says enough."""
    try:
        operate_to_death(name, root)
    except OSError as error:
        assert str(root) in str(error)
        assert "\n" not in str(error)
        raise SystemExit(error.errno) from None


@pytest.mark.parametrize("call", range(1, 8))
def test_a_disk_that_fills_up_at_any_reservation(tmp_path, monkeypatch, call):
    """The same without a disk to fill: the ``call``-th reservation fails."""
    reserve, count = os.posix_fallocate, 0

    def failing(*arguments):
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing)
        with pytest.raises(OSError, match=r"cannot reserve 0\.3 MB: No space left on device: '.*\.new'"):
            tiny_build(tmp_path / "store")
    assert not list(tmp_path.rglob("*.new"))
    rows = versions(tmp_path)["store"][0]
    # Three reservations for the staged rows, one for the curvature, one for each of three shards.
    assert rows == max(call - 5, 0) * SHARD_ROWS
    assert len(tiny_build(tmp_path / "store")) == len(LENGTHS)
    assert trackstar.verify_store(tmp_path / "store") == []


def test_a_limit_on_the_size_of_files(tmp_path):
    child = start(limited_build, tmp_path)
    assert finish(child) == errno.EFBIG
    assert len(trackstar.open_store(tmp_path)) == 0
    assert len(tiny_build(tmp_path)) == len(LENGTHS)


def limited_build(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        build_to_death(path)
    except OSError as error:
        assert str(path) in str(error)
        raise SystemExit(error.errno) from None


@pytest.mark.parametrize("name", ["append", "merge", "reencode"])
def test_a_disk_that_fills_up_at_any_reservation_of_an_operation(tmp_path, prepared, monkeypatch, name):
    """Nothing is left but what was committed, and the next call ends it."""
    reserve = os.posix_fallocate
    for call in range(1, 20):
        count = 0

        def failing(*arguments, call=call):
            nonlocal count
            count += 1
            if count == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            reserve(*arguments)

        root = shutil.copytree(prepared, tmp_path / str(call))
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", failing)
            try:
                OPERATIONS[name](root)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                assert str(error.filename).endswith(".new")
            else:
                break
        assert not list(root.rglob("*.new"))
        versions(root)
        OPERATIONS[name](root)
    assert call > 3


@contextlib.contextmanager
def read_only(folder):
    """Nothing below ``folder`` can be written; root needs a mount for it."""
    if os.geteuid():
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)
        return
    twin = folder.with_name("twin")
    folder.rename(twin)
    with mounted(folder, "--bind", str(twin)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    folder.rmdir()
    twin.rename(folder)


def test_a_read_only_folder(tmp_path):
    store = tmp_path / "store"
    tiny_build(store)
    empty = tmp_path / "above" / "empty"
    empty.mkdir(parents=True)
    with read_only(store):
        opened = trackstar.open_store(store)
        assert trackstar.verify_store(opened) == []
        queries = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
        assert attribute(opened, tiny_model(), queries, k=2).scores.shape == (1, 2)
        assert opened.text(4) == "text 4 é"
    with read_only(empty.parent), pytest.raises(OSError, match=r"Read-only|Permission denied") as caught:
        tiny_build(empty)
    assert str(empty) in str(caught.value)
    assert not (empty / "manifest.json").exists()


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_in_a_read_only_folder(tmp_path, prepared, name):
    root = shutil.copytree(prepared, tmp_path / "root")
    with read_only(root), pytest.raises(OSError, match=r"Read-only|Permission denied") as caught:
        OPERATIONS[name](root)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_below(root) == files_below(prepared)
