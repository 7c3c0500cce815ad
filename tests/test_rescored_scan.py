"""Scans of narrow rows beside a wider copy: its answers, rows counted, memory kept; and the bounds of those without."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_store
from trackstar import StoreError, open_store
from trackstar.scoring.attribution import score_rows
from trackstar.scoring.scan import plan_scan
from trackstar.scoring.selection import select
from trackstar.storage.deletion import delete_rows

from trackstar_kernels import mixed_topk

L, D = 2, 64
SHARDS = (90, 120, 1, 100)
DELETED = [0, 91, 250]
KEPT = [row for row in range(sum(SHARDS)) if row not in DELETED]
NARROW = ("int8", "int4", "sign")


def random_rows(count, seed):
    return torch.randn(count, L, D, generator=torch.Generator().manual_seed(seed))


def shards():
    """Rows, some of which are there twice, in other shards."""
    found = [random_rows(count, i) for i, count in enumerate(SHARDS)]
    found[3][10:30] = found[0][10:30]
    return found


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A store of each dtype, with a wider copy and without: by (dtype, whether it has one)."""
    path = tmp_path_factory.mktemp("rescored")
    found = {}
    for dtype, wide in [*itertools.product(NARROW, ("float16", None)), ("float16", None)]:
        name = path / f"{dtype}-{wide}"
        make_store(name, shards(), dtype=dtype, wide=wide, rotated=True)
        delete_rows(name, DELETED)
        found[dtype, wide is not None] = open_store(name)
    return found


@pytest.fixture(scope="module")
def queries():
    return random_rows(7, 100)


def scan(store, queries, mixing, *, where=None, k=5, directions=(True, False), piece_rows=40, rescore=True):
    planned = plan_scan(
        store, select(store, where), len(queries), k, directions=directions, mixed=mixing > 0, rescore=rescore
    )
    return dataclasses.replace(planned, piece_rows=piece_rows).run(queries, mixing)


def assert_same(found, wanted):
    assert torch.equal(found.indices, wanted.indices)
    assert torch.equal(found.scores, wanted.scores)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("mixing", [0.0, 0.6])
@pytest.mark.parametrize("where", [None, KEPT[::3], range(80, 200)], ids=["all", "scattered", "range"])
@pytest.mark.parametrize("directions", [(True,), (False,), (True, False)])
def test_the_answer_is_the_float16_store_s(stores, queries, dtype, mixing, where, directions):
    """Bit for bit, at both ends, with rows that a filter scatters, and ties."""
    found = scan(stores[dtype, True], queries, mixing, where=where, directions=directions)
    wanted = scan(stores["float16", False], queries, mixing, where=where, directions=directions)
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)
        assert one.bounds is None and other.bounds is None and other.rescored is None
        assert ((one.rescored >= 5) & (one.rescored <= len(KEPT))).all()


@settings(max_examples=20)
@given(
    dtype=st.sampled_from(NARROW),
    kept=st.lists(st.booleans(), min_size=sum(SHARDS), max_size=sum(SHARDS)),
    piece_rows=st.integers(1, 130),
    cut=st.integers(1, 6),
    mixing=st.sampled_from([0.0, 0.9]),
    k=st.integers(1, 12),
    long_run=st.sampled_from([1, 2000, 4 << 20]),
)
def test_whatever_the_pieces_and_batches(stores, queries, dtype, kept, piece_rows, cut, mixing, k, long_run):
    where = [row for row in KEPT if kept[row]] or KEPT
    k = min(k, len(where))
    results = []
    for store in (stores[dtype, True], stores["float16", False]):
        planned = plan_scan(store, select(store, where), len(queries), k, directions=(True, False))
        batches = [range(cut), range(cut, len(queries))]
        planned = dataclasses.replace(planned, piece_rows=piece_rows, batches=batches)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trackstar.scoring.pieces.LONG_RUN", long_run)
            results.append(planned.run(queries, mixing))
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("mixing", [0.0, 0.8])
def test_what_narrowing_lost_decides(tmp_path, mixing):
    """Rows so near each other that their codes are nearly the same, the best of them among the last."""
    rows = random_rows(1, 1) + 1e-3 * random_rows(200, 2)
    store = make_store(tmp_path / "store", [rows[:60], rows[60:]], dtype="int4", wide="float32", rotated=True)
    queries = store.rows(190, 195) - store.rows(0, 200).mean(0)
    (found,) = scan(store, queries, mixing, directions=(True,), k=3, piece_rows=30)
    wide = torch.cat([shard.wide for shard in store.shards])
    norms = torch.cat([shard.squared_norms for shard in store.shards])
    scores, indices = mixed_topk(queries, wide, norms, 3, mixing)
    assert torch.equal(found.indices, indices) and torch.equal(found.scores, scores)
    coded = scan(store, queries, mixing, directions=(True,), k=3, rescore=False)[0]
    assert not torch.equal(coded.indices, indices)


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    """Many rows that int8 codes tell apart, with wider ones."""
    path = tmp_path_factory.mktemp("rescored") / "long"
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(1000, 1, 1024, generator=generator) for _ in range(3)]
    return make_store(path, rows, dtype="int8", wide="float16", rotated=True)


@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_few_rows_are_scored_again_where_codes_tell_them_apart(long_rows, mixing):
    queries = torch.randn(3, 1, 1024, generator=torch.Generator().manual_seed(6))
    (found,) = scan(long_rows, queries, mixing, directions=(True,), k=10, piece_rows=500)
    assert ((found.rescored >= 10) & (found.rescored < 600)).all()


def test_codes_that_rule_out_too_little_are_left_alone(stores, queries, monkeypatch):
    """Sign's: most pieces come from the wider rows alone, and all rows are counted."""
    from trackstar.scoring import pieces

    forms = []
    piece = pieces.Piece
    monkeypatch.setattr(pieces, "Piece", lambda *arguments: forms.append(arguments[2]) or piece(*arguments))
    (found,) = scan(stores["sign", True], queries, 0.6, directions=(True,), piece_rows=10)
    assert (found.rescored == len(KEPT)).all()
    assert forms.count(False) < len(forms) / 2
    assert False in forms[3:]  # now and then codes get another chance


@pytest.mark.parametrize("mixing", [0.0, 0.6])
@pytest.mark.parametrize("dtype", NARROW)
def test_without_the_copy_scores_come_with_their_bounds(stores, queries, dtype, mixing):
    for store, rescore in ((stores[dtype, False], True), (stores[dtype, True], False)):
        found = scan(store, queries, mixing, where=KEPT[::2], rescore=rescore)
        everything = scan(stores["float16", False], queries, mixing, directions=(True,), k=len(KEPT))[0]
        exact = torch.zeros(len(queries), sum(SHARDS)).scatter_(1, everything.indices, everything.scores)
        for one in found:
            assert one.rescored is None
            assert one.bounds.shape == one.scores.shape and one.bounds.dtype == torch.float32
            assert ((one.scores - exact.gather(1, one.indices)).abs() <= one.bounds).all()
            assert one.bounds.max() < {"int8": 0.05, "int4": 0.5, "sign": 2.01}[dtype]


def test_a_damaged_wider_copy_is_named_where_it_is_needed(tmp_path, queries):
    store = make_store(tmp_path / "store", shards(), dtype="int8", wide="float16", rotated=True)
    file = store.shards[1].folder.path / "wide" / "data.ninja"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"wide.* does not match its checksum"):
        score_rows(open_store(store.path), queries, k=3)
    score_rows(open_store(store.path), queries, k=3, rescore=False)
    score_rows(open_store(store.path), queries, k=3, where=range(90))
