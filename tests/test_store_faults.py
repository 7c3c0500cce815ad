"""What becomes of a store when something goes wrong: nothing committed is lost, nothing damaged is served."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import time
from pathlib import Path

import killable
import numpy as np
import psutil
import pytest
import torch
import trackstar
from conftest import files_below
from killable import LENGTHS, SHARD_ROWS, SPEC, build_to_death, finish, start, tiny_build, tiny_model
from trackstar import StoreError, verify_store
from trackstar.cli import main
from trackstar.curvature import Curvature
from trackstar.gradients.examples import Encoded
from trackstar.optimizer.second_moments import SecondMoments
from trackstar.scoring.attribution import attribute, score_rows
from trackstar.storage.layout import Layout
from trackstar.storage.manifest import Manifest
from trackstar.storage.shard import StoredRows, write_shard
from trackstar.storage.writer import making
from trackstar.storage.writing import write_curvature

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(path, files) of a store built without trouble in a child, as those to compare it with are."""
    path = tmp_path_factory.mktemp("uninterrupted") / "store"
    assert finish(start(build_to_death, path)) == 0
    return path, files_below(path)


@pytest.fixture(scope="module")
def corrected(tmp_path_factory):
    """A store that has every kind of file."""
    path = tmp_path_factory.mktemp("corrected") / "store"
    moments = SecondMoments.estimate(tiny_model(), [{"input_ids": [1, 2, 3]}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        tiny_build(path, correction=moments.correction("exact"), dtype="int8", wide="float16")
    return path


@pytest.fixture
def store(corrected, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(corrected, tmp_path / "store")


def committed(path):
    """Rows that the store holds, which is intact; 0 where nothing was committed yet."""
    if not (path / "manifest.json").exists():
        return 0
    store = trackstar.open_store(path)
    assert verify_store(store) == []
    for shard in store.shards:
        assert store.tokens(shard.start).tolist() is not None
    return len(store)


def assert_goes_on(path, uninterrupted):
    """What was committed is right, and the rest of the build gives the files of one without trouble."""
    reference, files = uninterrupted
    rows = committed(path)
    if rows:
        expected = trackstar.open_store(reference).rows(0, rows)
        assert torch.equal(trackstar.open_store(path).rows(0, rows), expected)
    assert finish(start(build_to_death, path)) == 0
    assert files_below(path) == files
    return rows


@pytest.mark.parametrize("changes", [(), (("sample", 7),)], ids=["whole", "sampled"])
def test_killed_before_every_commit(tmp_path, changes):
    """Between any two files that appear under their final name."""
    whole = tmp_path / "whole"
    assert finish(start(build_to_death, whole, None, changes)) == 0
    files = files_below(whole)
    step, kept = 0, []
    while True:
        path = tmp_path / f"{step}"
        code = finish(start(build_to_death, path, step, changes))
        if code == 0:
            break
        assert code == -9
        kept.append(committed(path))
        assert finish(start(build_to_death, path, None, changes)) == 0
        assert files_below(path) == files
        step += 1
    assert kept == sorted(kept)
    assert set(kept) == set(range(0, len(LENGTHS), SHARD_ROWS))


def test_killed_at_random_moments(tmp_path, uninterrupted):
    """Twenty times; each next build goes on from there, and no committed shard is ever lost."""
    moments = random.Random(0)
    began = time.monotonic()
    assert finish(start(build_to_death, tmp_path / "timed")) == 0
    duration = time.monotonic() - began
    kills = 0
    for number in range(1000):
        path = tmp_path / str(number)
        rows, finished = 0, False
        while not finished and kills < 20:
            child = start(build_to_death, path)
            time.sleep(moments.uniform(0, duration))
            child.kill()
            finished = finish(child) == 0
            kills += not finished
            if path.exists():
                assert committed(path) >= rows
                rows = committed(path)
        if path.exists():
            assert assert_goes_on(path, uninterrupted) >= rows
        if kills >= 20:
            return


def flip(file, position, mask=0x10):
    content = bytearray(file.read_bytes())
    content[position] ^= mask
    file.write_bytes(content)


def shorten(file):
    os.truncate(file, file.stat().st_size - 1)


def zero_the_end(file):
    """As after a power failure, where a file's size came to the disk and its last bytes did not."""
    content = file.read_bytes()
    half = len(content) // 2
    assert any(content[half:])
    file.write_bytes(content[:half] + bytes(len(content) - half))


def lengthen(file):
    with file.open("ab") as stream:
        stream.write(b"\0")


DAMAGES = {
    "torn": (zero_the_end, "does not match its checksum"),
    "longer": (lengthen, r"has \d+ bytes instead of \d+"),
    "flipped": (lambda file: flip(file, file.stat().st_size // 2), "does not match its checksum"),
    "truncated": (shorten, r"has \d+ bytes instead of \d+"),
    "missing": (Path.unlink, "is missing"),
}

SHARD = "shards/0000000003-0000000006"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        f"{SHARD}/rows/data.ninja",
        f"{SHARD}/rows/shape.ninja",
        f"{SHARD}/scales/data.ninja",
        f"{SHARD}/squared_norms/data.ninja",
        f"{SHARD}/wide/data.ninja",
        f"{SHARD}/tokens/data.ninja",
        f"{SHARD}/strings/data.ninja",
        f"{SHARD}/offsets/dtype.ninja",
        f"{SHARD}/checksums.json",
        "curvature/train/data.ninja",
        "curvature/whitener/dtype.ninja",
        "curvature/checksums.json",
        "correction/correction.safetensors",
    ],
)
def test_damage_is_named_and_nothing_served_from_it(store, monkeypatch, capsys, name, damage):
    spoil, message = DAMAGES[damage]
    if name.endswith("checksums.json") and damage in ("truncated", "longer"):
        message = "does not match its checksum"
    spoil(store / name)
    opened = trackstar.open_store(store)
    (line,) = verify_store(opened)
    assert line.startswith(name)
    monkeypatch.setattr("sys.argv", ["trackstar", "verify", str(store)])
    with pytest.raises(SystemExit) as exit_of_verify:
        main()
    assert exit_of_verify.value.code == 1
    assert capsys.readouterr().out == line + "\n"

    before = files_below(store)
    queries = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]

    def refused():
        return pytest.raises(StoreError, match=rf"{name} {message}; nothing is served from it")

    if name.startswith(SHARD):
        array = name.removeprefix(f"{SHARD}/").split("/")[0]
        reads = {
            ("wide",): lambda: opened.rows(2, 4),
            ("offsets", "strings"): lambda: opened.text(5),
            ("offsets", "tokens"): lambda: opened.tokens(3),
            ("rows", "scales", "squared_norms"): lambda: score_rows(
                opened, torch.ones(1, *opened.row_shape), k=1, rescore=False
            ),
        }
        for arrays, read in reads.items():
            with refused() if array in (*arrays, "checksums.json") else contextlib.nullcontext():
                read()
        assert len(opened.rows(0, 3)) == 3
    else:
        with refused():
            attribute(opened, tiny_model(), queries, k=1)
    assert files_below(store) == before


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        "index/00000000/shards/data.ninja",
        "index/00000000/checksums.json",
        "deletions/00000001/rows/data.ninja",
        "deletions/00000001/rows/dtype.ninja",
    ],
)
def test_damaged_lists(tmp_path, monkeypatch, name, damage):
    monkeypatch.setattr("trackstar.storage.index.SEGMENT", 2)
    tiny_build(tmp_path)
    for rows in ([5], [4, 7]):
        trackstar.delete_rows(tmp_path, rows)
    spoil, message = DAMAGES[damage]
    if name.endswith("checksums.json") and damage in ("truncated", "longer"):
        message = "does not match its checksum"
    spoil(tmp_path / name)
    opened = trackstar.open_store(tmp_path)
    before = files_below(tmp_path)
    (line,) = verify_store(opened)
    assert line.startswith(name)
    reads = {
        "index": (lambda: opened.shards[0], lambda: opened.rows(0, 1)),
        "deletions": (lambda: len(opened),),
    }
    works = {
        "index": (lambda: trackstar.merge_stores(tmp_path / "new", [tmp_path]),),
        "deletions": (lambda: trackstar.delete_rows(tmp_path, [1]),),
    }
    kind = name.split("/")[0]
    for use in (*reads[kind], *works[kind]):
        with pytest.raises(StoreError, match=rf"{name} {message}; nothing is served from it"):
            use()
    assert {file: content for file, content in files_below(tmp_path).items() if "new/" not in file} == before


def test_a_shard_that_goes_missing_later_is_not_made_anew(store):
    """mmap_ninja makes the folders that it is to open."""
    opened = trackstar.open_store(store)
    opened.rows(0, len(opened))
    shutil.rmtree(store / SHARD)
    for read in (lambda: opened.rows(3, 4), lambda: opened.text(3), lambda: opened.tokens(3)):
        with pytest.raises(StoreError, match=rf"{SHARD}/.* is missing"):
            read()
    assert not (store / SHARD).exists()


def test_any_flipped_byte_of_the_manifest_is_refused(store):
    file = store / "manifest.json"
    original = file.read_bytes()
    for position in random.Random(0).sample(range(len(original)), 60) + list(range(60)):
        for mask in (0x01, 0x20, 0xFF):
            flip(file, position, mask)
            with pytest.raises(StoreError, match=r"is damaged|is a store of format"):
                trackstar.open_store(store)
            file.write_bytes(original)
    for content in (
        b"",
        original[:-1],
        original + b" ",
        original.replace(b",", b", "),
        b"[]",
        b"{}",
        b"null",
    ):
        file.write_bytes(content)
        with pytest.raises(StoreError, match=r"is damaged"):
            trackstar.open_store(store)


def test_a_damaged_manifest_is_not_built_over(store):
    flip(store / "manifest.json", 100)
    before = files_below(store)
    with pytest.raises(StoreError, match=r"manifest.json is damaged"):
        tiny_build(store)
    assert files_below(store) == before


def test_a_store_of_another_format(store):
    file = store / "manifest.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({"format": document["format"] + 1, "anything": "else"}))
    for use in (trackstar.open_store, tiny_build):
        with pytest.raises(StoreError, match=r"is a store of format 5; this version reads format 4"):
            use(store)


def test_no_store(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(FileNotFoundError, match=r"there is no store at .* \(no manifest.json\)"):
            trackstar.open_store(path)


def test_damaged_staged_rows_do_not_reach_the_store(tmp_path):
    """Killed while collecting; the rows that wait for R_train are not yet in any manifest."""
    assert finish(start(build_to_death, tmp_path, 3)) == -9
    flip(tmp_path / "staging" / "00000000" / "rows" / "data.ninja", 100)
    with pytest.raises(StoreError, match=r"staging/00000000: rows/data.ninja does not match its checksum"):
        tiny_build(tmp_path)


def test_an_unreadable_file_is_an_error(store, monkeypatch):
    def refuse(file, mode="r", **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    opened = trackstar.open_store(store)
    monkeypatch.setattr(Path, "open", refuse)
    for read in (
        lambda: verify_store(opened),
        lambda: opened.rows(0, 1),
        lambda: trackstar.open_store(store),
    ):
        with pytest.raises(PermissionError, match=r"Permission denied: '.*store"):
            read()


def stopping_build(path, begun, may_end):
    """Hold the lock until told to go on."""
    track = killable.build_store.__globals__["track"]

    def waiting(*arguments):
        begun.set()
        may_end.wait(60)
        return track(*arguments)

    killable.build_store.__globals__["track"] = waiting
    build_to_death(path)


def test_two_builds_on_one_path(tmp_path, uninterrupted):
    begun, may_end = killable.FORKS.Event(), killable.FORKS.Event()
    first = start(stopping_build, tmp_path, begun, may_end)
    assert begun.wait(60)
    with pytest.raises(StoreError, match=rf"another process is writing to the store at {tmp_path}"):
        tiny_build(tmp_path)
    may_end.set()
    assert finish(first) == 0
    assert files_below(tmp_path) == uninterrupted[1]


def test_a_killed_build_holds_no_lock(tmp_path, uninterrupted):
    begun, may_end = killable.FORKS.Event(), killable.FORKS.Event()
    first = start(stopping_build, tmp_path, begun, may_end)
    assert begun.wait(60)
    first.kill()
    assert finish(first) == -9
    assert_goes_on(tmp_path, uninterrupted)


@pytest.mark.parametrize("moment", range(1, 8, 2))
def test_an_interrupt_from_the_keyboard(tmp_path, monkeypatch, moment):
    replace, count = os.rename, 0

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == moment:
            raise KeyboardInterrupt
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            tiny_build(tmp_path)
    assert not list(tmp_path.rglob("*.new"))
    committed(tmp_path)
    assert len(tiny_build(tmp_path)) == len(LENGTHS)


def test_leftovers_of_a_first_commit_that_never_came(tmp_path):
    (tmp_path / "manifest.json.new").write_text("torn")
    assert tiny_build(tmp_path).correction is None
    assert {entry.name for entry in tmp_path.iterdir()} == {"lock", "manifest.json", "curvature", "shards"}


BLOCKS, SIZE = 4, 16
SHARD_BYTES = 4 << 20


def synthetic_store(path, size):
    """``size`` bytes of random float16 rows, in equal shards of 4 MB; no model."""
    os.fsync = lambda handle: None
    identity = {"spec": SPEC.as_dict(), "dtype": "float16", "wide": None, "correction": None}
    layout = Layout("float16", None, BLOCKS, SIZE)
    count = SHARD_BYTES // layout.row_bytes
    total = size // SHARD_BYTES * count
    eye = torch.eye(SIZE, dtype=torch.float64).repeat(BLOCKS, 1, 1)
    curvature = Curvature(eye, torch.zeros(BLOCKS).double(), torch.ones(BLOCKS, SIZE).double(), eye.float())
    nothing = np.zeros(0, np.int32)
    examples = [Encoded("", "", nothing, nothing)] * count
    rows = torch.randn(count, BLOCKS, SIZE, generator=torch.Generator().manual_seed(0))
    with making(path, Manifest(identity, (BLOCKS, SIZE), ({"examples": total},), total)) as writer:
        writer.commit(dataclasses.replace(writer.manifest, curvature=write_curvature(path, curvature)))
        for first in range(0, total, count):
            stored = StoredRows.encode(rows, None, layout)
            writer.commit_shard(write_shard(path, layout, first, stored, examples))


def capped_query(path, warm, allowance):
    """Score a store, allowed ``allowance`` bytes beyond what a small store ``warm`` has already taken."""
    rows = torch.randn(2, BLOCKS, SIZE, generator=torch.Generator().manual_seed(0))
    score_rows(trackstar.open_store(warm), rows, k=10, mixing=0.5)
    idle = psutil.Process().memory_info()
    resource.setrlimit(resource.RLIMIT_DATA, (idle.data + allowance,) * 2)
    Path("/proc/self/clear_refs").write_text("5")
    score_rows(trackstar.open_store(path), rows, k=10, mixing=0.5)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    assert peak - idle.rss < allowance, f"{(peak - idle.rss) / 1e6:.0f} MB more than the idle process"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("size", "allowance"), [(192 << 20, 64 << 20), pytest.param(640 << 20, 160 << 20, marks=pytest.mark.slow)]
)
def test_a_query_of_a_store_larger_than_its_memory(tmp_path, size, allowance):
    for name, bytes_of_rows in (("warm", SHARD_BYTES), ("large", size)):
        assert finish(start(synthetic_store, tmp_path / name, bytes_of_rows)) == 0
    assert finish(start(capped_query, tmp_path / "large", tmp_path / "warm", allowance)) == 0
    shutil.rmtree(tmp_path / "large")
