import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_store
from trackstar import open_store
from trackstar.scoring.selection import Selection, matching, select, shards_of
from trackstar.storage.deletion import delete_rows

masks = st.lists(st.booleans(), max_size=12).map(lambda bits: np.array(bits, bool))


def rows(selection):
    return [row for start, stop in selection for row in range(start, stop)]


@given(masks, masks, st.integers(0, 12), st.integers(0, 12))
def test_selections_are_sets_of_rows(first, second, start, stop):
    size = max(len(first), len(second))
    first, second = (np.pad(mask, (0, size - len(mask))) for mask in (first, second))
    a, b = Selection.of_mask(first), Selection.of_mask(second)
    assert rows(a) == np.flatnonzero(first).tolist()
    assert len(a) == first.sum()
    assert rows(a & b) == np.flatnonzero(first & second).tolist()
    assert rows(a.without(b)) == np.flatnonzero(first & ~second).tolist()
    assert rows(a.within(start, stop)) == [row for row in rows(a) if start <= row < stop]
    shuffled = np.random.default_rng(0).permutation(np.repeat(rows(a), 2)).astype(np.int64)
    again = Selection.of_rows(shuffled)
    for found in (a, again):  # as few runs as there can be
        assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(found))
    assert rows(again) == rows(a)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three shards of five rows; ids repeat after ten, rows 3 and 11 are deleted."""
    path = tmp_path_factory.mktemp("selection") / "store"
    metadata = {0: {"source": "wiki", "year": 1999}, 1: {"source": "news"}, 2: {"year": 2010}}
    make_store(
        path,
        [torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)],
        name=lambda i: f"doc/{i % 10}",
        metadata=lambda i: json.dumps(metadata.get(i % 5, {})),
    )
    delete_rows(path, [3, 11])
    return open_store(path)


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (None, [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14]),
        (range(2, 6), [2, 4, 5]),
        (range(1, 9, 3), [1, 4, 7]),
        ([12, 0, 3, 12], [0, 12]),
        (np.array([12, 0]), [0, 12]),
        (torch.tensor([True] * 4 + [False] * 11), [0, 1, 2]),
        ({"doc/2", "doc/4"}, [2, 4, 12, 14]),
        (lambda example: example.index % 4 == 0, [0, 4, 8, 12]),
        (lambda example: example.text == "text 7", [7]),
        (lambda example: example.metadata.get("year", 0) > 2000, [2, 7, 12]),
        (matching("id", "doc/[12]"), [1, 2, 12]),
        (matching("source", "wiki"), [0, 5, 10]),
        (matching("source", "w*s"), None),
        (matching("year", "19*"), [0, 5, 10]),
        (matching("author", "*"), None),
        ([], None),
        (range(4, 4), None),
    ],
)
def test_filters(store, where, kept):
    if kept is None:
        with pytest.raises(ValueError, match="where must keep at least one of the 13 rows of the store"):
            select(store, where)
    else:
        assert rows(select(store, where)) == kept


def test_filters_together(store):
    """A predicate sees only what the other filters keep; ids are found wherever they are."""
    seen = []
    chosen = select(store, lambda e: seen.append(e.index) or True, range(0, 7), ["doc/2", "doc/5", "doc/9"])
    assert rows(chosen) == seen == [2, 5]


def test_shards_without_chosen_rows_are_not_opened(store):
    starts = [shard.start for shard in shards_of(store, select(store, [1, 2, 4, 12]))]
    assert starts == [0, 10]


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        (range(0, 16), ValueError, r"a range within 0 to 15 \(the store's rows\), got range\(0, 16\)"),
        (range(-1, 3), ValueError, "a range within 0 to 15"),
        ([0, 15], ValueError, "row indices from 0 to 14, got 15"),
        ([-1], ValueError, "row indices from 0 to 14, got -1"),
        ([True] * 14, ValueError, "a mask of the store's 15 rows, got 14 booleans"),
        (["doc/1", "doc/11", "doc/12"], ValueError, "ids must be of rows of .*, got 'doc/11'"),
        (
            "doc/1",
            TypeError,
            "where must be a range, indices, a mask, ids or a function of an example, got 'doc/1'",
        ),
        (7, TypeError, "where must be a range, .* got 7"),
        ([0.5], TypeError, "where must hold row indices, booleans or ids, got float64"),
        ([[1]], TypeError, r"got int64 of shape \(1, 1\)"),
        (["doc/1", 2], TypeError, "where must hold row indices, booleans or ids"),
    ],
)
def test_bad_filters(store, where, error, message):
    with pytest.raises(error, match=message):
        select(store, where)
