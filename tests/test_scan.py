import dataclasses
import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_store
from trackstar import StoreError, open_store
from trackstar.scoring.scan import MEMORY, plan_scan
from trackstar.scoring.selection import Selection, select, shards_of
from trackstar.storage.deletion import delete_rows

from trackstar_kernels import mixed_topk
from trackstar_kernels.scoring import merge_topk

L, D = 3, 8
SHARDS = (13, 20, 1, 16)
DELETED = [0, 14, 15, 33, 40]


def random_rows(count, seed):
    return torch.randn(count, L, D, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["float32", "float16", "int8"])
def store(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "store"
    make_store(path, [random_rows(count, i) for i, count in enumerate(SHARDS)], dtype=request.param)
    delete_rows(path, DELETED)
    return open_store(path)


@pytest.fixture(scope="module")
def queries():
    return random_rows(9, 100)


def whole(store, queries, k, mixing, rows, largest=True):
    """The answer of one call of the kernel on a copy of the rows."""
    codes, scales, norms = (
        None
        if store.shards[0].scales is None and name == "scales"
        else torch.cat([getattr(shard, name) for shard in store.shards])[rows]
        for name in ("codes", "scales", "squared_norms")
    )
    scores, positions = mixed_topk(queries, codes, norms, k, mixing, scales=scales, largest=largest)
    return scores, torch.as_tensor(rows)[positions]


def assert_same(found, wanted):
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-6)


@settings(max_examples=25)
@given(
    mask=st.lists(st.booleans(), min_size=50, max_size=50),
    piece_rows=st.integers(1, 30),
    cuts=st.sets(st.integers(1, 8), max_size=3),
    mixing=st.sampled_from([0, 0.6]),
    k=st.integers(1, 6),
    long_run=st.sampled_from([1, 300, 4 << 20]),
)
def test_the_answer_is_that_of_the_chosen_rows(store, queries, mask, piece_rows, cuts, mixing, k, long_run):
    """Whatever the pieces, the batches and the rows; with rows of a shard taken together or run by run."""
    mask = np.array(mask)
    mask[-1] = True
    chosen = select(store, mask)
    rows = np.setdiff1d(np.flatnonzero(mask), DELETED)
    k = min(k, len(rows))
    scan = plan_scan(store, chosen, len(queries), k, directions=(True, False))
    bounds = [0, *sorted(cuts), len(queries)]
    batches = [range(a, b) for a, b in itertools.pairwise(bounds)]
    scan = dataclasses.replace(scan, piece_rows=piece_rows, batches=batches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trackstar.scoring.pieces.LONG_RUN", long_run)
        found = scan.run(queries, mixing)
    for direction, one in zip((True, False), found, strict=True):
        assert_same(one, whole(store, queries, k, mixing, rows, direction))


def test_scans_of_shards_merge_into_the_scan_of_the_store(store, queries):
    everything = select(store)
    parts = []
    for shard in shards_of(store, everything):
        chosen = everything & Selection.of_range(shard.start, shard.stop)
        parts += plan_scan(store, chosen, len(queries), min(5, len(chosen))).run(queries, 0.5)
    (wanted,) = plan_scan(store, everything, len(queries), 5).run(queries, 0.5)
    assert_same(merge_topk(parts[::-1], 5), wanted)


@pytest.mark.parametrize("mixed", [True, False])
def test_more_memory_never_means_more_passes(store, mixed):
    everything = select(store)
    passes, rows = [], []
    for memory in (23_000_000, 27_000_000, 40_000_000, MEMORY):
        scan = plan_scan(store, everything, 5000, 20, mixed=mixed, memory=memory)
        assert scan.bytes <= memory
        assert [q for batch in scan.batches for q in batch] == list(range(5000))
        passes.append(len(scan.batches))
        rows.append(scan.piece_rows)
    assert passes == sorted(passes, reverse=True)
    assert passes[0] > 1 == passes[-1]
    assert min(rows) >= 64


@pytest.mark.parametrize(
    ("memory", "message"),
    [(1 << 20, r"memory must be at least [\d,]+ bytes for 9 queries and k = 3 on this store, got 1,048,576")]
    + [(wrong, "memory must be a number of bytes, got") for wrong in (1.5e9, True, "256MB", None)],
)
def test_too_little_memory(store, memory, message):
    with pytest.raises(ValueError, match=message):
        plan_scan(store, select(store), 9, 3, memory=memory)


@pytest.fixture
def damaged(tmp_path):
    """A store whose second shard is damaged."""
    store = make_store(tmp_path / "store", [random_rows(5, i) for i in range(3)])
    file = store.shards[1].folder.path / "rows" / "data.ninja"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    return open_store(store.path)


def test_damage_is_named_and_what_a_filter_leaves_out_is_not_read(damaged, queries):
    with pytest.raises(StoreError, match="does not match its checksum"):
        plan_scan(damaged, select(damaged), len(queries), 3).run(queries, 0.5)
    assert not reading()
    (found,) = plan_scan(damaged, select(damaged, [1, 2, 3, 12]), len(queries), 4).run(queries, 0.5)
    assert sorted(found[1][0].tolist()) == [1, 2, 3, 12]


def test_an_interrupted_scan_leaves_no_thread(store, queries, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("trackstar.scoring.scan._Best.add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        plan_scan(store, select(store), len(queries), 3).run(queries, 0.5)
    assert not reading()


def reading():
    """Whether a thread that reads ahead is still there."""
    return any(thread.name.startswith("trackstar-read") for thread in threading.enumerate())
