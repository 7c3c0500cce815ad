"""Exact answers from a wider copy of narrow rows, and how far narrow rows alone may be off."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import NATIVE, on_backend, randn, threads

import trackstar_kernels as tk
from trackstar_kernels import _C
from trackstar_kernels.scoring import _bounds, merge_topk, prepare_task

narrow = pytest.mark.parametrize("dtype", ["int8", "int4", "sign"])
wide = pytest.mark.parametrize("width", [torch.float16, torch.float32])


@pytest.fixture(params=[case for case in NATIVE if case.startswith("cpu")])
def isa(request):
    with on_backend(request.param):
        yield


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


class Store:
    """Rows, narrow and wider."""

    def __init__(self, rows, dtype, width=torch.float16):
        self.codes, self.scales, self.norms = tk.encode_rows(rows, None, dtype)
        self.wider = rows.to(width)

    def rescored(self, queries, k, **options):
        return tk.rescored_topk(queries, self.codes, self.wider, self.norms, k, scales=self.scales, **options)

    def mixed(self, queries, k, mixing, **options):
        return tk.rescored_mixed_topk(
            queries, self.codes, self.wider, self.norms, k, mixing, scales=self.scales, **options
        )

    def answer(self, queries, k, **options):
        """Of the wider rows, one query at a time."""
        found = [tk.score_topk(query[None], self.wider, k, **options) for query in queries]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def decoded(self):
        return tk.decode_rows(self.codes, self.scales, self.wider.shape[2], torch.float64)


def assert_same(found, wanted):
    scores, indices = wanted
    assert torch.equal(found[1], indices)
    assert torch.equal(found[0], scores) or torch.equal(found[0].nan_to_num(9), scores.nan_to_num(9))


def equally_coded(dtype, count, best, L=2, d=64):
    """A store whose codes are all the same: the narrow rows know nothing of what sets the wider ones apart.

    And queries for which rows ``best`` and on are the best by as much as narrowing can take from them, while others
    that come first nearly reach that.
    """
    codes, _, _ = tk.encode_rows(randn(1, L, d), None, dtype)
    numbers = tk.decode_rows(codes, None, d, torch.float64)
    shift = 0.9 * torch.rand(count, L, d, generator=torch.Generator().manual_seed(1)) - 0.45
    near = len(shift[best:])
    shift[:near] = 0.95 * shift[best:]
    rows = (numbers * (1 + shift) if dtype == "sign" else numbers + shift).float()
    store = Store(rows, dtype, torch.float32)
    store.codes = codes.repeat(count, 1, 1)
    store.scales = ((rows * numbers).sum(2) / numbers.square().sum(2)).float()
    return store, 1e-3 * (store.wider - store.decoded()).float()[best:]


# ---- rescored_topk -----------------------------------------------------------------------------------------


@narrow
@wide
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("Q", [1, 4, 7, 33])
def test_rescoring_gives_the_wider_rows_answer(isa, dtype, width, largest, Q):
    queries, store = randn(Q, 3, 65), Store(randn(301, 3, 65, seed=1), dtype, width)
    found = store.rescored(queries, 6, largest=largest, start=40)
    assert_same(found, store.answer(queries, 6, largest=largest, start=40))
    assert found[2].dtype == torch.int64 and found[2].shape == (Q,)
    assert ((found[2] >= 6) & (found[2] <= 301)).all()


@given(
    dtype=st.sampled_from(["int8", "int4", "sign"]),
    width=st.sampled_from([torch.float16, torch.float32]),
    Q=st.sampled_from([1, 3, 9, 20]),
    N=st.integers(1, 90),
    L=st.integers(1, 3),
    d=st.sampled_from([1, 2, 5, 16, 31, 32, 33, 97, 257, 600]),
    part=st.floats(0, 1),
    largest=st.booleans(),
    isa=st.sampled_from(_C.available_isas()),
)
def test_odd_shapes(dtype, width, Q, N, L, d, part, largest, isa):
    k = max(1, round(part * N))
    queries, store = randn(Q, L, d), Store(randn(N, L, d, seed=1), dtype, width)
    with on_backend(f"cpu:{isa}"):
        assert_same(store.rescored(queries, k, largest=largest), store.answer(queries, k, largest=largest))


@narrow
@pytest.mark.parametrize("number", [1, 3])
def test_the_answer_does_not_depend_on_threads(dtype, number):
    queries, store = randn(6, 2, 48), Store(randn(3000, 2, 48, seed=1), dtype)
    wanted = store.answer(queries, 9)
    with threads(number):
        assert_same(store.rescored(queries, 9), wanted)


@narrow
@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize("Q", [1, 12])
def test_what_narrowing_lost_decides(isa, dtype, k, Q):
    """All codes are equal, and each query is what was lost of one row: nothing less than the full bound will do."""
    store, queries = equally_coded(dtype, 900, 900 - Q)
    found = store.rescored(queries, k)
    assert_same(found, store.answer(queries, k))
    assert (found[1][:, 0] == torch.arange(900 - Q, 900)).all()


def test_few_rows_are_scored_again_where_little_is_lost():
    queries, rows = randn(8, 1, 512), randn(5000, 1, 512, seed=1)
    counts = {dtype: Store(rows, dtype).rescored(queries, 10)[2] for dtype in ("int8", "int4", "sign")}
    assert counts["int8"].max() < 1000
    assert (counts["int8"] < counts["int4"]).all()
    assert (counts["sign"] == 5000).all()


@narrow
def test_ties_and_many_results(dtype):
    """Rows that are there twice, and more results than rows are waiting at a time."""
    rows = randn(1500, 2, 16, seed=1)
    rows[700:1400] = rows[:700]
    queries, store = randn(3, 2, 16), Store(rows, dtype)
    for k in (1300, 1500):
        assert_same(store.rescored(queries, k), store.answer(queries, k))


@narrow
@pytest.mark.parametrize("largest", [True, False])
def test_rows_that_are_not_numbers_come_last(dtype, largest):
    rows = randn(200, 2, 16, seed=1)
    rows[20, 0, 3], rows[90] = torch.nan, torch.nan
    rows[5] = 0
    queries, store = randn(7, 2, 16), Store(rows, dtype)
    assert_same(store.rescored(queries, 200, largest=largest), store.answer(queries, 200, largest=largest))


@narrow
@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e30])
def test_very_small_and_very_large_numbers(dtype, factor):
    queries, rows = randn(6, 2, 40), randn(300, 2, 40, seed=1)
    for q, r in ((factor, 1), (1, factor), (factor, 1 / factor)):
        store = Store(r * rows, dtype, torch.float32)
        assert_same(store.rescored(q * queries, 5), store.answer(q * queries, 5))


@narrow
def test_small_float16_rows(dtype):
    """Subnormal float16 numbers are far from what was encoded."""
    store = Store(1e-6 * randn(400, 2, 40, seed=1), dtype)
    queries = randn(6, 2, 40)
    assert_same(store.rescored(queries, 5), store.answer(queries, 5))


@narrow
def test_reads_wider_rows_where_they_are(dtype):
    rows, queries = randn(50, 2, 24, seed=1), randn(3, 2, 24)
    store = Store(rows, dtype)
    wanted = store.rescored(queries, 7)[:2]
    padded = torch.full((50, 64), torch.nan, dtype=torch.float16)
    padded[:, :48] = store.wider.flatten(1)
    store.wider = padded[:, :48].unflatten(1, (2, 24))
    assert_same(store.rescored(queries, 7), wanted)


def test_the_reference_scores_all_wider_rows():
    queries, store = randn(3, 2, 24), Store(randn(50, 2, 24, seed=1), "int8")
    scores, indices, rescored = store.rescored(queries, 7, backend="reference")
    assert torch.equal(indices, store.answer(queries, 7)[1]) and (rescored == 50).all()
    torch.testing.assert_close(scores, store.answer(queries, 7)[0])


# ---- rescored_mixed_topk -----------------------------------------------------------------------------------


@narrow
@wide
@pytest.mark.parametrize("mixing", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("Q", [1, 4, 13, 40])
def test_mixed_rescoring_gives_the_wider_rows_answer(dtype, width, mixing, Q):
    """Bit for bit, with fewer queries than block dimensions, as many, and more."""
    queries, store = randn(Q, 3, 16), Store(randn(400, 3, 16, seed=1), dtype, width)
    largest = Q % 2 == 0
    wanted = tk.mixed_topk(queries, store.wider, store.norms, 9, mixing, largest=largest, start=7)
    found = store.mixed(queries, 9, mixing, largest=largest, start=7)
    assert_same(found, wanted)
    assert ((found[2] >= 9) & (found[2] <= 400)).all()


@narrow
@pytest.mark.parametrize("mixing", [0.0, 0.9])
def test_mixed_what_narrowing_lost_decides(dtype, mixing, monkeypatch):
    monkeypatch.setattr("trackstar_kernels.scoring._rescoring.BOUNDS", 2**13)
    store, queries = equally_coded(dtype, 300, 297)
    found = store.mixed(queries, 2, mixing)
    assert torch.equal(found[1], tk.mixed_topk(queries, store.wider, store.norms, 2, mixing)[1])
    assert (found[1][:, 0] == torch.arange(297, 300)).all()


def test_a_bound_of_less_than_the_distance_would_not_do(monkeypatch):
    """What the tests above can tell apart."""
    monkeypatch.setattr("trackstar_kernels.scoring._rescoring.BOUNDS", 2**13)
    store, queries = equally_coded("int8", 300, 297)
    whole = _bounds.distances
    monkeypatch.setattr(
        "trackstar_kernels.scoring._rescoring.distances", lambda *arguments: 0.8 * whole(*arguments)
    )
    assert not (store.mixed(queries, 1, 0.9)[1][:, 0] == torch.arange(297, 300)).any()


@narrow
@pytest.mark.parametrize("norm", [1, 30])
def test_mixed_rows_that_are_queries(dtype, norm):
    rows = norm * 20**0.5 * randn(150, 2, 48, seed=1) / 96**0.5
    store = Store(rows, dtype, torch.float32)
    for Q in (20, 64):
        wanted = tk.mixed_topk(rows[:Q], store.wider, store.norms, 5, 0.9)
        assert_same(store.mixed(rows[:Q], 5, 0.9), wanted)


def test_few_rows_of_a_task_are_scored_again_where_little_is_lost():
    queries, rows = randn(8, 2, 256), randn(3000, 2, 256, seed=1)
    counts = {dtype: Store(rows, dtype).mixed(queries, 10, 0.9)[2] for dtype in ("int8", "int4", "sign")}
    assert counts["int8"].max() < 1000
    assert (counts["int8"] < counts["int4"]).all()
    assert (counts["sign"] > 2900).all()


@narrow
@pytest.mark.parametrize("mixing", [0.0, 0.9])
def test_a_prepared_task_rescores_shards(dtype, mixing, monkeypatch):
    monkeypatch.setattr("trackstar_kernels.scoring._rescoring.BOUNDS", 2**13)
    queries, store = randn(5, 2, 16), Store(randn(300, 2, 16, seed=1), dtype)
    task = prepare_task(queries, mixing)
    whole = store.mixed(queries, 8, mixing)[:2]
    parts = [
        task.rescored_topk(
            *(t[a : a + 60] for t in (store.codes, store.wider, store.norms)),
            8,
            scales=store.scales[a : a + 60],
            start=a,
        )[:2]
        for a in range(0, 300, 60)
    ]
    assert_same(merge_topk(parts, 8), whole)


@pytest.mark.parametrize("mixing", [0.0, 0.9])
def test_other_backends_score_all_wider_rows(mixing):
    queries, store = randn(3, 2, 24), Store(randn(50, 2, 24, seed=1), "int8")
    _, indices, rescored = store.mixed(queries, 7, mixing, backend="reference")
    assert torch.equal(indices, store.mixed(queries, 7, mixing)[1]) and (rescored == 50).all()


# ---- score_bounds ------------------------------------------------------------------------------------------


@narrow
@pytest.mark.parametrize("mixing", [None, 0.0, 0.9, 0.99])
@pytest.mark.parametrize("Q", [2, 40])
def test_bounds_hold(dtype, mixing, Q):
    queries, rows = randn(Q, 2, 32), randn(60, 2, 32, seed=1)
    rows[0], rows[1] = 0, 3 * queries[0]
    store = Store(rows, dtype, torch.float32)

    def scores(rows, scales):
        if mixing is None:
            found = tk.score_topk(queries, rows, 60, scales=scales)
        else:
            found = tk.mixed_topk(queries, rows, store.norms, 60, mixing, scales=scales)
        return torch.empty_like(found[0]).scatter(1, found[1], found[0])

    indices = torch.arange(60).repeat(Q, 1) + 11
    bounds = tk.score_bounds(
        queries, store.codes, store.norms, indices, scales=store.scales, mixing=mixing, start=11
    )
    assert bounds.shape == (Q, 60) and bounds.dtype == torch.float32
    apart = (scores(store.wider, None) - scores(store.codes, store.scales)).abs()
    assert (apart <= bounds).all()
    assert (bounds[:, 0] <= 1e-4).all()


@narrow
def test_bounds_are_no_larger_than_they_must_be(dtype):
    """A query that is what was lost of a row finds all of it."""
    store = Store(randn(9, 2, 64, seed=1), dtype, torch.float32)
    queries = (store.wider - store.decoded()).float()
    indices = torch.arange(9)[:, None]
    bounds = tk.score_bounds(queries, store.codes, store.norms, indices, scales=store.scales)
    lost = queries.double().square().sum((1, 2))
    assert (bounds[:, 0] >= lost).all() and (bounds[:, 0] <= 1.1 * lost).all()


# ---- Errors ------------------------------------------------------------------------------------------------

GOOD = {
    "queries": torch.ones(2, 3, 4),
    "codes": torch.ones(5, 3, 4, dtype=torch.int8),
    "wider": torch.ones(5, 3, 4).half(),
    "squared_norms": torch.ones(5, 3),
    "k": 2,
    "scales": torch.ones(5, 3),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.ones(2, 12)}, ValueError, r"queries must have shape \(Q, L, d\), got \(2, 12\)"),
        ({"queries": torch.full((2, 3, 4), torch.nan)}, ValueError, "queries must be finite"),
        ({"codes": torch.ones(5, 3, 4)}, TypeError, "codes must have dtype int8, uint8, int32; got float32"),
        ({"codes": torch.ones(5, 3, 4, dtype=torch.uint8)}, ValueError, r"codes must have shape \(N, 3, 3\)"),
        ({"wider": torch.ones(5, 3, 5).half()}, ValueError, r"wider must have shape \(5, 3, 4\), got"),
        ({"wider": torch.ones(5, 3, 4).bfloat16()}, TypeError, "wider must have dtype float16, float32; got"),
        ({"wider": [1.0]}, TypeError, "wider must be a torch.Tensor, got list"),
        ({"scales": torch.ones(5)}, ValueError, r"scales must have shape \(5, 3\), got \(5,\)"),
        ({"scales": None}, TypeError, "scales must be a torch.Tensor, got NoneType"),
        ({"squared_norms": torch.ones(5)}, ValueError, r"squared_norms must have shape \(5, 3\), got"),
        ({"k": 6}, ValueError, r"k must be from 1 to N \(=5\), got 6"),
        ({"backend": "triton"}, ValueError, "must be one of cpu, reference, got 'triton'"),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_errors(change, error, message, mixed):
    op = tk.rescored_mixed_topk if mixed else tk.rescored_topk
    with pytest.raises(error, match=message):
        op(**{**GOOD, **change}, **({"mixing": 0.5} if mixed else {}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": torch.tensor([[0, 5]] * 2)}, ValueError, "indices must be from 0 to 4, got"),
        ({"indices": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"indices must have shape \(2, k\)"),
        ({"indices": torch.zeros(2, 1)}, TypeError, "indices must have dtype int64; got float32"),
        ({"mixing": 1.0}, ValueError, "mixing must be at least 0 and less than 1, got 1.0"),
    ],
)
def test_bound_errors(change, error, message):
    arguments = {name: GOOD[name] for name in ("queries", "codes", "squared_norms", "scales")}
    with pytest.raises(error, match=message):
        tk.score_bounds(**{**arguments, "indices": torch.zeros(2, 1, dtype=torch.int64), **change})
