"""score_topk and mixed_topk against their float64 definitions."""

from contextlib import contextmanager

import pytest
import torch
from cuda_device import CUDA, cuda_runs
from hypothesis import given, settings
from hypothesis import strategies as st

import trackstar_kernels as tk
from trackstar_kernels import _C, scoring
from trackstar_kernels.scoring import _reference, merge_topk, prepare_task
from trackstar_kernels.scoring._hessian import Hessian
from trackstar_kernels.scoring._merge import best_first

NATIVE = [f"cpu:{isa}" for isa in _C.available_isas()]
BACKENDS = ["reference", *NATIVE, *CUDA]
# Scores of torch.mm may change in their last bits with the shapes around them; the native kernels' may not.
native_only = pytest.mark.parametrize("backend", NATIVE, indirect=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@contextmanager
def on_backend(case):
    """One of BACKENDS, the native one at its instruction set level; yields the backend's name."""
    name, _, isa = case.partition(":")
    if name == "cuda":
        with cuda_runs(isa, scoring.BACKENDS):
            yield name
        return
    before = _C.isa()
    _C.set_isa(isa or before)
    try:
        yield name
    finally:
        _C.set_isa(before)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with on_backend(request.param) as name:
        yield name


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread():
    """Tests that are about threads ask for more."""
    with threads(1):
        yield


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decode(rows, scales, dtype):
    """Floating-point rows (N, L, d) times their scales."""
    return tk.decode_rows(rows, scales, rows.shape[2], dtype)


def exact_scores(queries, rows, scales=None):
    """(Q, N) in float64."""
    L = rows.shape[1] if rows.dim() == 3 else 1
    queries, rows = queries.reshape(len(queries), L, -1), rows.reshape(len(rows), L, -1)
    scales = None if scales is None else scales.reshape(len(rows), -1)
    return queries.double().flatten(1) @ decode(rows, scales, torch.float64).flatten(1).T


def check_topk(result, exact, k, largest, tolerance, start=0):
    """The scores are those of the indices and no better row was left out, within ``tolerance`` (Q, N)."""
    scores, indices = result
    positions = indices - start
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64
    assert scores.shape == indices.shape == (len(exact), k)
    assert all(len(set(row)) == k for row in positions.tolist())
    assert ((scores - exact.gather(1, positions)).abs() <= tolerance.gather(1, positions)).all()
    order = scores.diff(dim=1)
    assert (order <= 0).all() if largest else (order >= 0).all()
    sign = 1 if largest else -1
    left_out = (sign * exact - tolerance).scatter(1, positions, -torch.inf)
    assert (left_out.amax(1) <= sign * scores[:, -1]).all()


def float32_tolerance(queries, rows, scales=None):
    """Twice the error of torch in float32, and rounding of the size of the products."""
    L = rows.shape[1] if rows.dim() == 3 else 1
    q, r = queries.reshape(len(queries), L, -1), rows.reshape(len(rows), L, -1)
    s = None if scales is None else scales.reshape(len(rows), -1)
    single = q.flatten(1) @ decode(r, s, torch.float32).flatten(1).T
    exact = exact_scores(queries, rows, scales)
    magnitude = exact_scores(queries.abs(), rows.abs(), None if scales is None else scales.abs())
    return 2 * (single - exact).abs().amax() + 1e-7 * magnitude


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("Q", [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 33])
def test_score_topk_is_exact(backend, dtype, largest, Q):
    queries, rows = randn(Q, 301), randn(157, 301, seed=1, dtype=dtype)
    result = tk.score_topk(queries, rows, 7, largest=largest, start=1000, backend=backend)
    check_topk(result, exact_scores(queries, rows), 7, largest, float32_tolerance(queries, rows), start=1000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["rows", "blocks"])
@pytest.mark.parametrize("Q", [3, 20])
def test_scales_multiply_rows(backend, dtype, shape, Q):
    N, L, d = 101, 3, 37
    queries, rows = randn(Q, L, d), randn(N, L, d, seed=1, dtype=dtype)
    scales = randn(*((N,) if shape == "rows" else (N, L)), seed=2)
    result = tk.score_topk(queries, rows, 5, scales=scales, backend=backend)
    exact = exact_scores(queries, rows, scales)
    check_topk(result, exact, 5, True, float32_tolerance(queries, rows, scales))


@settings(max_examples=60, deadline=None)
@given(
    Q=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 19, 31, 40]),
    N=st.integers(1, 120),
    L=st.integers(1, 3),
    d=st.sampled_from([1, 2, 3, 5, 8, 13, 16, 31, 97, 255, 256, 257, 521, 2053]),
    dtype=st.sampled_from(DTYPES),
    largest=st.booleans(),
    scaled=st.booleans(),
    part=st.floats(0, 1),
    isa=st.sampled_from(_C.available_isas()),
)
def test_odd_shapes(Q, N, L, d, dtype, largest, scaled, part, isa):
    k = max(1, round(part * N))
    queries, rows = randn(Q, L, d), randn(N, L, d, seed=1, dtype=dtype)
    scales = randn(N, L, seed=2) if scaled else None
    before = _C.isa()
    _C.set_isa(isa)
    try:
        result = tk.score_topk(queries, rows, k, scales=scales, largest=largest)
    finally:
        _C.set_isa(before)
    exact = exact_scores(queries, rows, scales)
    check_topk(result, exact, k, largest, float32_tolerance(queries, rows, scales))


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("Q", "parts"),
    [
        (1, []),
        (4, [(0, 2), (1, 4)]),
        (8, [(1, 7), (0, 5), (1, 8)]),
        (45, [(0, 9), (3, 12), (20, 45), (7, 24)]),
    ],
    ids=["one", "four", "eight", "many"],
)
def test_scores_do_not_depend_on_company(backend, dtype, Q, parts):
    """A score has the same bits at any place among any queries and rows, and with any number of threads."""
    N, D = 203, 700
    queries, rows = randn(Q, D), randn(N, D, seed=1, dtype=dtype)

    def everything(queries, rows):
        """(Q, N) scores."""
        scores, indices = tk.score_topk(queries, rows, len(rows))
        return torch.empty_like(scores).scatter(1, indices, scores)

    whole = everything(queries, rows)
    for n in (1, 2, 3):
        with threads(n):
            assert torch.equal(everything(queries, rows), whole)
    assert torch.equal(everything(queries.flip(0), rows).flip(0), whole)
    for first, last in parts:
        assert torch.equal(everything(queries[first:last], rows), whole[first:last])
    for first, last in [(0, 1), (1, 8), (5, 60), (100, 203)]:
        assert torch.equal(everything(queries, rows[first:last]), whole[:, first:last])


@native_only
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("Q", [2, 40])
@pytest.mark.parametrize("pieces", [1, 3, 7])
def test_merged_shards_equal_the_whole(backend, largest, Q, pieces):
    queries, rows = randn(Q, 65), randn(400, 65, seed=1)
    rows[200:] = rows[:200]  # every score is there twice
    parts, start = [], 50
    for piece in rows.tensor_split(pieces):
        k = min(30, len(piece))
        parts.append(tk.score_topk(queries, piece, k, largest=largest, start=start, backend=backend))
        start += len(piece)
    merged = merge_topk(parts, 30, largest)
    whole = tk.score_topk(queries, rows, 30, largest=largest, start=50, backend=backend)
    assert torch.equal(merged[0], whole[0]) and torch.equal(merged[1], whole[1])


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_merging_is_sorting(largest, k):
    """Scores of few values, infinities, both zeros and NaN; indices beyond 32 bits, in no order."""
    values = torch.tensor([1.5, -1.5, 0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    generator = torch.Generator().manual_seed(k)
    scores = values[torch.randint(len(values), (9, 50), generator=generator)]
    indices = torch.stack([torch.randperm(50, generator=generator) for _ in range(9)]) * 2**33
    order = best_first(scores, indices, largest)[:, :k]
    for sizes in ([50], [1, 20, 29]):
        parts = zip(scores.split(sizes, 1), indices.split(sizes, 1), strict=True)
        found = merge_topk(list(parts), k, largest)
        assert torch.equal(found[0].nan_to_num(2), scores.gather(1, order).nan_to_num(2))
        assert torch.equal(found[1], indices.gather(1, order))
    with pytest.raises(ValueError, match=r"parts must be scores \(Q, k\)"):
        merge_topk([(scores, indices), (scores[:4], indices[:4])], k, largest)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("Q", [1, 20])
@pytest.mark.parametrize("threads_", [1, 3])
def test_ties_go_to_the_smaller_index(backend, largest, Q, threads_):
    values = torch.tensor([0.0, -1.0, 2.0])[torch.arange(1000) % 3]
    rows = values[:, None].expand(1000, 16).contiguous()
    rows[3] = -0.0
    with threads(threads_):
        scores, indices = tk.score_topk(torch.ones(Q, 16), rows, 700, largest=largest, backend=backend)
    order = values.argsort(stable=True, descending=largest)[:700].expand(Q, -1)
    assert torch.equal(indices, order)
    assert torch.equal(scores, 16 * values[order])


@native_only
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 4, 60])
@pytest.mark.parametrize("most", [2, 1000], ids=["ties", "none"])
def test_threads_that_share_what_they_found(backend, largest, k, most):
    """Fewer of them than results, as many, and more."""
    generator = torch.Generator().manual_seed(k)
    rows = torch.randint(-most, most + 1, (30000, 24), generator=generator).float()
    queries = torch.randint(-1, 2, (20, 24), generator=generator).float()
    scores = queries @ rows.T
    order = scores.argsort(stable=True, descending=largest, dim=1)[:, :k]
    for n in (2, 4, 9):
        with threads(n):
            found = tk.score_topk(queries, rows, k, largest=largest)
        assert torch.equal(found[1], order)
        assert torch.equal(found[0], scores.gather(1, order))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("Q", [1, 20])
@pytest.mark.parametrize("numbers", [50, 700])
def test_nan_rows_come_last(backend, largest, Q, numbers):
    """NaN after every number, even infinity on the wrong side; NaNs among themselves by index."""
    N, D = 900, 24
    rows = torch.full((N, D), torch.nan)
    good = torch.randperm(N, generator=torch.Generator().manual_seed(3))[:numbers]
    rows[good] = randn(numbers, D, seed=1)
    worst = good.min()
    rows[worst] = -torch.inf if largest else torch.inf
    queries = randn(Q, D).abs()
    scores, indices = tk.score_topk(queries, rows, 300, largest=largest, backend=backend)
    shown = min(numbers, 300)
    assert not scores[:, :shown].isnan().any() and scores[:, shown:].isnan().all()
    if numbers < 300:
        assert (indices[:, numbers - 1] == worst).all()
        mask = torch.ones(N, dtype=torch.bool)
        mask[good] = False
        assert torch.equal(indices[:, numbers:], mask.nonzero()[: 300 - numbers, 0].expand(Q, -1))


@pytest.mark.parametrize("Q", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_widens_exactly(backend, Q, dtype):
    """Subnormals, zeros and infinities too; NaNs stay NaNs."""
    rows = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    scores, indices = tk.score_topk(torch.ones(Q, 1), rows, 2**16, backend=backend)
    found = torch.empty_like(scores).scatter(1, indices, scores)
    assert torch.equal(found.isnan(), rows.T.isnan().expand(Q, -1))
    assert torch.equal(found.nan_to_num(), rows.T.float().nan_to_num().expand(Q, -1))


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Q", [2, 20])
def test_reads_rows_where_they_are(backend, dtype, Q):
    """Rows inside wider rows, surrounded by NaN; and rows that are not dense."""
    queries, rows = randn(Q, 45), randn(70, 45, seed=1, dtype=dtype)
    wanted = tk.score_topk(queries, rows, 9, backend=backend)
    wide = torch.full((72, 64), torch.nan, dtype=dtype)
    wide[1:71, 3:48] = rows
    for same in (wide[1:71, 3:48], rows.T.contiguous().T):
        found = tk.score_topk(queries, same, 9, backend=backend)
        assert torch.equal(found[1], wanted[1]) and torch.equal(found[0], wanted[0])


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("Q", [1, 9])
def test_sorted_stores(backend, direction, Q):
    """Every row beats all before it, or none does: the reservoir's worst and best cases."""
    rows = direction * torch.arange(1.0, 3001)[:, None]
    scores, indices = tk.score_topk(torch.ones(Q, 1), rows, 13, backend=backend)
    order = torch.arange(2999, 2986, -1) if direction == 1 else torch.arange(13)
    assert torch.equal(indices, order.expand(Q, -1)) and torch.equal(scores, rows[indices, 0])


# ---- mixed_topk --------------------------------------------------------------------------------------------


def squared_norms(rows):
    return rows.float().square().sum(2)


def exact_mixed(queries, rows, mixing, scales=None, norms=None):
    """(Q, N) in float64."""
    N = len(rows)
    scores, indices = _reference.mixed_topk(queries.double(), rows, norms, N, mixing, scales, True, 0)
    return torch.empty_like(scores).scatter(1, indices, scores)


def check_mixed(queries, rows, mixing, k=None, backend="cpu", scales=None, largest=True):
    k = k or len(rows)
    per_block = None if scales is None else scales.reshape(len(rows), -1)
    norms = squared_norms(decode(rows, per_block, torch.float32))
    result = tk.mixed_topk(
        queries, rows, norms, k, mixing, scales=scales, largest=largest, start=5, backend=backend
    )
    exact = exact_mixed(queries, rows, mixing, per_block)
    check_topk(result, exact, k, largest, torch.full_like(exact, 1e-5), start=5)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixing", [0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("Q", [1, 5, 13, 14, 16, 40])
def test_mixed_topk_is_the_dense_definition(dtype, mixing, Q):
    """Fewer queries than block dimensions, as many, and more."""
    queries, rows = randn(Q, 3, 16), randn(211, 3, 16, seed=1, dtype=dtype)
    check_mixed(queries, rows, mixing, largest=Q % 2 == 0)


@pytest.mark.parametrize("backend_", ["cpu", "reference"])
@pytest.mark.parametrize("shape", ["rows", "blocks"])
@pytest.mark.parametrize("mixing", [0.0, 0.9])
def test_mixed_scales(backend_, shape, mixing):
    queries, rows = randn(6, 3, 16), randn(90, 3, 16, seed=1)
    scales = randn(*((90,) if shape == "rows" else (90, 3)), seed=2).abs()
    if backend_ == "cpu":
        check_mixed(queries, rows, mixing, scales=scales)
    else:
        norms = squared_norms(rows)
        scores, _ = tk.mixed_topk(queries, rows, norms, 90, mixing, scales=scales, backend="reference")
        exact = exact_mixed(queries, rows, mixing, scales.reshape(90, -1)).sort(1, descending=True).values
        assert (scores - exact).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixing", [0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("Q", [1, 20, 64])
@pytest.mark.parametrize("norm", [1, 30])
def test_rows_that_are_queries_score_one(dtype, mixing, Q, norm):
    """Also where ‖y‖² − c·SᵀMS cancels to a hundred-thousandth: c‖y‖² is near 1e5 with norm 30."""
    L, d = 2, 48
    rows = (norm * Q**0.5 * randn(150, L, d, seed=1) / (L * d) ** 0.5).to(dtype)
    queries = rows[:Q].float()
    scores, indices = check_mixed(queries, rows, mixing)
    own = torch.empty_like(scores).scatter(1, indices - 5, scores).diagonal()
    assert ((own - 1).abs() <= 1e-5).all()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("mixing", [0, 0.9])
@pytest.mark.parametrize("Q", [2, 10, 30])
def test_mixed_shards_merge(largest, mixing, Q):
    """Bit for bit, with any number of threads."""
    queries, rows = randn(Q, 2, 16), randn(300, 2, 16, seed=1)
    rows[150:] = rows[:150]  # every score is there twice
    norms = squared_norms(rows)
    whole = tk.mixed_topk(queries, rows, norms, 20, mixing, largest=largest)
    for n in (1, 3):
        with threads(n):
            parts = [
                tk.mixed_topk(
                    queries, rows[a : a + 60], norms[a : a + 60], 20, mixing, largest=largest, start=a
                )
                for a in range(0, 300, 60)
            ]
        scores, indices = merge_topk(parts, 20, largest)
        assert torch.equal(indices, whole[1]) and torch.equal(scores, whole[0])


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("Q", [3, 140])
def test_mixed_with_large_blocks(n, Q):
    """Blocks large enough for the linear algebra underneath to use its threads."""
    queries, rows = randn(Q, 3, 150), randn(60, 3, 150, seed=1)
    with threads(n):
        check_mixed(queries, rows, 0.9)


@pytest.mark.parametrize("k", [1, 40, 70])
@pytest.mark.parametrize("largest", [True, False])
def test_rows_that_need_float64(k, largest, monkeypatch):
    """Sixty of seventy rows lie in the span of the queries; a few at a time are computed again."""
    monkeypatch.setattr("trackstar_kernels.scoring._hessian.SCRATCH", 2**13)
    queries, rows = 30 * randn(5, 2, 16), randn(70, 2, 16, seed=1)
    rows[5:65] = torch.einsum("nq,qld->nld", randn(60, 5, seed=2), queries)
    check_mixed(queries, rows, 0.9, k=k, largest=largest)


@pytest.mark.parametrize("mixing", [0.0, 0.9])
def test_stored_norms_are_used(mixing):
    """A quantized row is normalised by the norm it had before."""
    queries, rows = randn(3, 2, 16), randn(20, 2, 16, seed=1)
    norms = squared_norms(rows)
    plain, more = (tk.mixed_topk(queries, rows, n, 20, mixing) for n in (norms, 4 * norms))
    if mixing == 0:
        assert torch.equal(plain[1], more[1])
        assert ((plain[0] / 2 - more[0]).abs() <= 1e-6).all()
    else:
        assert (more[0].abs() < plain[0].abs()).all()


@pytest.mark.parametrize("backend_", ["cpu", "reference"])
@pytest.mark.parametrize("mixing", [0, 0.9])
def test_zero_rows_and_queries_score_zero(backend_, mixing):
    queries, rows = randn(3, 2, 16), randn(10, 2, 16, seed=1)
    queries[1] = 0
    rows[4] = 0
    scores, indices = tk.mixed_topk(queries, rows, squared_norms(rows), 10, mixing, backend=backend_)
    found = torch.empty_like(scores).scatter(1, indices, scores)
    assert (found[1] == 0).all() and (found[:, 4] == 0).all()
    assert torch.equal(indices[1], torch.arange(10))
    assert (found[0].abs() > 0).sum() == 9


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("mixing", [0, 0.9])
def test_mixed_ties_and_nans(largest, mixing):
    queries, rows = randn(3, 2, 16), randn(6, 2, 16, seed=1).repeat(2, 1, 1)
    rows[[2, 7]] = torch.nan
    scores, indices = tk.mixed_topk(queries, rows, squared_norms(rows), 12, mixing, largest=largest)
    assert torch.equal(indices[:, 10:], torch.tensor([[2, 7]]).expand(3, -1))
    assert scores[:, 10:].isnan().all() and not scores[:, :10].isnan().any()
    pairs = torch.tensor([n for n in range(12) if n % 6 not in (1, 2)])
    for row, score in zip(indices.tolist(), scores, strict=True):
        for n in pairs[pairs < 6].tolist():
            first, second = row.index(n), row.index(n + 6)
            assert second == first + 1 and score[first] == score[second]


@pytest.mark.parametrize("mixing", [0, 0.5])
@pytest.mark.parametrize("Q", [3, 30])
def test_a_prepared_task_gives_the_same_bits(backend, mixing, Q):
    """For any shard, again and again, whatever else is asked of it in between."""
    queries, rows = randn(Q, 2, 16), randn(90, 2, 16, seed=1)
    norms, scales = squared_norms(rows), randn(90, 2, seed=2).abs()
    task = prepare_task(queries, mixing, backend=backend)
    for piece, largest in [(slice(0, 90), True), (slice(10, 50), False), (slice(0, 90), True)]:
        arguments = rows[piece], norms[piece], 7
        options = {"scales": scales[piece], "largest": largest, "start": piece.start}
        found = task.topk(*arguments, **options)
        wanted = tk.mixed_topk(queries, *arguments, mixing, **options, backend=backend)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("mixing", [0, 0.5])
@pytest.mark.parametrize("Q", [9, 30])
def test_queries_asked_in_batches_score_as_together(backend, mixing, Q):
    """Fewer queries than dimensions and more; rows that are queries too, whose norms cancel, included."""
    queries = randn(Q, 2, 16)
    rows = torch.cat([randn(40, 2, 16, seed=1), queries[:3]])
    norms = squared_norms(rows)
    wanted = tk.mixed_topk(queries, rows, norms, 7, mixing, backend=backend)
    batches = range(0, 5), range(5, 6), range(6, Q)
    tasks = [prepare_task(queries, mixing, asked=batch, backend=backend) for batch in batches]
    found = [torch.cat(halves) for halves in zip(*(task.topk(rows, norms, 7) for task in tasks), strict=True)]
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["asked", "task"])
@pytest.mark.parametrize("part", [range(2, 2), range(0, 4), range(-1, 2), range(0, 3, 2)])
def test_asked_queries_and_the_tasks_must_be_some_of_the_queries(name, part):
    with pytest.raises(ValueError, match=rf"{name} must be a range within 0 to 3 \(the queries\), got range"):
        prepare_task(randn(3, 2, 4), 0.5, **{name: part})


@pytest.mark.parametrize("mixing", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(("members", "others"), [(1, 1), (5, 3), (9, 6), (20, 3), (3, 40)])
def test_a_task_of_other_queries(backend, mixing, members, others):
    """R_task of queries that are not scored: in the form for few and for many, against dense float64.

    Rows and queries that are of the task too, that lie in its span, and that are zero, included.
    """
    task = randn(members, 2, 16, seed=3)
    if members > 1:
        task[-1] = task[0]  # a singular Gram matrix
    asked = randn(others, 2, 16, seed=4)
    asked[0] = task.sum(0)
    asked[-1] = 0 if others > 1 else asked[-1]
    rows = torch.cat([randn(40, 2, 16, seed=1), task, asked])
    queries = torch.cat([task, asked])
    prepared = prepare_task(
        queries, mixing, asked=range(members, len(queries)), task=range(members), backend=backend
    )
    scores, indices = prepared.topk(rows, squared_norms(rows), len(rows))
    scores = scores.gather(1, indices.argsort(dim=1))
    x, y, z = task.double(), rows.double(), asked.double()
    inner = square_y = square_z = 0.0
    for b in range(2):
        hessian = mixing * x[:, b].T @ x[:, b] / members + (1 - mixing) * torch.eye(16, dtype=torch.float64)
        inverse = torch.linalg.inv(hessian)
        inner = inner + z[:, b] @ inverse @ y[:, b].T
        square_y = square_y + ((y[:, b] @ inverse) * y[:, b]).sum(1)
        square_z = square_z + ((z[:, b] @ inverse) * z[:, b]).sum(1)
    norms = (square_z[:, None] * square_y).sqrt()
    wanted = torch.where(norms == 0, 0, inner / norms)
    # The reference solves with R itself, in float32.
    assert (scores.double() - wanted).abs().max() <= (1e-4 if backend == "reference" else 1e-5)


@pytest.mark.parametrize("mixing", [0.1, 0.9, 0.99, 0.99999])
@pytest.mark.parametrize("members", [1, 7, 27])
@pytest.mark.parametrize("other", [False, True])
def test_the_forms_for_few_and_for_many_queries_are_one_result(mixing, members, other):
    """In float64 to rounding, however near λ is to 1, and the kernel beside them."""
    queries = 3 * randn(members + 4, 2, 32, seed=3)
    rows = torch.cat([randn(40, 2, 32, seed=1), queries])
    task = slice(0, members if other else None)
    asked = slice(members, None) if other else slice(0, None)

    def scores_of(hessian):
        numerators = query_squares = row_squares = 0.0
        for b, (factor, combine, squares) in enumerate(hessian.blocks()):
            y = rows[:, b].double()
            t = factor @ y.T
            numerators, query_squares = numerators + combine @ t, query_squares + squares
            row_squares = row_squares + hessian.base * y.square().sum(1) + hessian.sign * t.square().sum(0)
        return numerators / (query_squares[:, None] * row_squares).sqrt()

    class Dense(Hessian):
        many = True

    few = Hessian(queries, mixing, asked, task if other else None)
    assert few.many == (members == 27)
    wanted = scores_of(Dense(queries, mixing, asked, task))
    assert (scores_of(few) - wanted).abs().max() < 1e-9 / (1 - mixing)
    kernel = prepare_task(
        queries,
        mixing,
        asked=range(*asked.indices(len(queries))[:2]),
        task=range(*task.indices(len(queries))[:2]),
        backend="cpu",
    )
    scores, indices = kernel.topk(rows, squared_norms(rows), len(rows))
    assert (scores.gather(1, indices.argsort(dim=1)).double() - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("mixing", [0, 0.5])
@pytest.mark.parametrize("Q", [3, 30])
@pytest.mark.parametrize("threads_", [1, 3])
def test_extremes_are_both_ends(backend, mixing, Q, threads_):
    """From one scan, ties, NaN and rows that need float64 included."""
    queries, rows = randn(Q, 2, 16), randn(300, 2, 16, seed=1)
    rows[150:] = rows[:150]  # every score is there twice
    rows[7] = torch.nan
    rows[20], rows[30] = 30 * queries[0], -30 * queries[1]
    task = prepare_task(queries, mixing, backend=backend)
    with threads(threads_):
        both = task.extremes(rows, squared_norms(rows), 40, start=5)
        for found, largest in zip(both, (True, False), strict=True):
            wanted = task.topk(rows, squared_norms(rows), 40, largest=largest, start=5)
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_more_mixing_changes_the_answer():
    queries, rows = randn(8, 2, 16), randn(100, 2, 16, seed=1)
    plain, mixed = (exact_mixed(queries, rows, mixing) for mixing in (0.0, 0.9))
    assert (plain - mixed).abs().max() > 0.1


# ---- merge_topk, errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [True, False])
def test_merge_orders_like_the_ops(largest):
    scores = torch.tensor([[1.0, torch.nan, -torch.inf], [2.0, 2.0, torch.nan]])
    parts = [
        (scores, torch.tensor([[5, 1, 7], [9, 4, 0]])),
        (scores + 0.0, torch.tensor([[3, 2, 6], [8, 1, 2]])),
    ]
    merged, indices = merge_topk(parts, 100, largest)
    assert merged.shape == (2, 6)
    first = [3, 5, 6, 7, 1, 2] if largest else [6, 7, 3, 5, 1, 2]
    assert indices.tolist() == [first, [1, 4, 8, 9, 0, 2]]
    assert torch.equal(merge_topk(parts, 2, largest)[1], indices[:, :2])


def test_merge_of_nothing():
    with pytest.raises(ValueError, match="parts"):
        merge_topk([], 3)


GOOD = {"queries": torch.ones(2, 3, 4), "rows": torch.ones(5, 3, 4), "k": 2}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": [[1.0]]}, TypeError, "queries must be a torch.Tensor"),
        ({"queries": torch.ones(4)}, ValueError, r"queries must have shape \(Q, D\) or \(Q, L, d\), got"),
        (
            {"queries": torch.ones(2, 3, 4).double()},
            TypeError,
            "queries must have dtype float32; got float64",
        ),
        ({"queries": torch.full((2, 3, 4), torch.nan)}, ValueError, "queries must be finite"),
        ({"queries": torch.full((2, 3, 4), torch.inf)}, ValueError, "queries must be finite"),
        ({"rows": torch.ones(5, 3, 5)}, ValueError, r"rows must have shape \(N, 3, 4\), got \(5, 3, 5\)"),
        ({"rows": torch.ones(5, 3, 4, dtype=torch.int16)}, TypeError, "int8, uint8, int32; got int16"),
        (
            {"rows": torch.ones(5, 3, 4, dtype=torch.int32)},
            ValueError,
            r"rows must have shape \(N, 3, 1\), got",
        ),
        ({"rows": torch.ones(0, 3, 4)}, ValueError, "must not be empty"),
        ({"k": 0}, ValueError, r"k must be from 1 to N \(=5\), got 0"),
        ({"k": 6}, ValueError, r"k must be from 1 to N \(=5\), got 6"),
        ({"k": 2.0}, TypeError, "k must be an int"),
        ({"start": -1}, ValueError, "start must be from 0 to"),
        ({"scales": torch.ones(4)}, ValueError, r"scales must have shape \(5,\) or \(5, 3\), got"),
        ({"scales": torch.ones(5).double()}, TypeError, "scales must have dtype float32"),
        ({"backend": "triton"}, ValueError, "must be one of cpu, reference, got 'triton'"),
    ],
)
def test_score_topk_errors(change, error, message):
    with pytest.raises(error, match=message):
        tk.score_topk(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"queries": torch.ones(2, 12), "rows": torch.ones(5, 12)},
            ValueError,
            r"\(Q, L, d\), got \(2, 12\)",
        ),
        ({"squared_norms": torch.ones(5)}, ValueError, r"squared_norms must have shape \(5, 3\), got"),
        ({"squared_norms": torch.ones(5, 3).half()}, TypeError, "squared_norms must have dtype float32"),
        ({"mixing": 1.0}, ValueError, "mixing must be at least 0 and less than 1, got 1.0"),
        ({"mixing": -0.1}, ValueError, "mixing must be"),
        ({"mixing": float("nan")}, ValueError, "mixing must be"),
        ({"mixing": "auto"}, TypeError, "mixing must be a float, got str"),
        ({"k": 6}, ValueError, "k must be"),
        ({"queries": torch.full((2, 3, 4), torch.nan)}, ValueError, "queries must be finite"),
    ],
)
def test_mixed_topk_errors(change, error, message):
    arguments = {**GOOD, "squared_norms": torch.ones(5, 3), "mixing": 0.5, **change}
    with pytest.raises(error, match=message):
        tk.mixed_topk(**arguments)
    task = {name: arguments.pop(name) for name in ("queries", "mixing")}
    with pytest.raises(error, match=message):
        prepare_task(**task).topk(**arguments)
