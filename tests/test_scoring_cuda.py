"""The CUDA backend of score_topk and mixed_topk: what the tests of the ops do not ask of it."""

import pytest
import torch
from cuda_device import CUDA, cuda_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scoring import check_mixed, check_topk, exact_mixed, randn, squared_norms

import trackstar_kernels as tk
from trackstar_kernels import _C, scoring
from trackstar_kernels.scoring import _cuda, _operands, merge_topk

ROW_TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


@pytest.fixture(params=CUDA, autouse=True)
def cuda(request):
    """The simulated device and the real one. Tests call ``_cuda``, which takes rows of more types than the ops."""
    with cuda_runs(request.param.partition(":")[2], scoring.BACKENDS):
        yield


def stored(N, L, d, dtype, seed=1):
    rows = randn(N, L, d, seed=seed)
    return (40 * rows).round().clamp(-127, 127).to(torch.int8) if dtype == torch.int8 else rows.to(dtype)


def products(queries, rows, scales=None):
    rows = rows.double() if scales is None else rows.double() * scales[:, :, None]
    return queries.double().flatten(1) @ rows.flatten(1).T


def bound(queries, rows, scales=None):
    """What README.md promises: 2⁻²¹ of the products' sizes, and what float16 loses of numbers that are tiny."""
    magnitude = products(queries.abs(), rows.abs(), None if scales is None else scales.abs())
    sizes = products(torch.ones_like(queries), rows.abs(), None if scales is None else scales.abs())
    return 2.0**-21 * magnitude + 2.0**-39 * queries.abs().amax((1, 2))[:, None] * sizes


def check(queries, rows, k, scales=None, largest=True):
    result = _cuda.score_topk(queries, rows, k, scales, largest, 7)
    exact = products(queries, rows, scales)
    check_topk(result, exact, k, largest, bound(queries, rows, scales), start=7)
    return result


@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("Q", [1, 16, 17, 70])
@pytest.mark.parametrize(("L", "d"), [(1, 256), (3, 64), (2, 48), (5, 13)])
def test_score_topk_is_exact(dtype, Q, L, d):
    """Aligned rows and others, whole steps and others."""
    queries, rows = randn(Q, L, d), stored(300, L, d, dtype)
    scales = randn(300, L, seed=2) if L == 5 else None
    check(queries, rows, 9, scales, largest=Q % 2 == 0)


@settings(max_examples=40, deadline=None)
@given(
    Q=st.sampled_from([1, 2, 15, 16, 17, 40, 64, 65, 130]),
    N=st.integers(1, 500),
    L=st.integers(1, 3),
    d=st.sampled_from([1, 2, 3, 8, 31, 32, 33, 63, 64, 65, 128, 200]),
    dtype=st.sampled_from(ROW_TYPES),
    largest=st.booleans(),
    scaled=st.booleans(),
    part=st.floats(0, 1),
)
def test_odd_shapes(Q, N, L, d, dtype, largest, scaled, part):
    queries, rows = randn(Q, L, d), stored(N, L, d, dtype)
    check(queries, rows, max(1, round(part * N)), randn(N, L, seed=2) if scaled else None, largest)


@pytest.mark.parametrize("dtype", ROW_TYPES)
def test_error_is_that_of_float32(dtype):
    """Over a thousand numbers, cut-off sums and split queries are no worse than rounded sums of whole ones."""
    queries, rows = randn(9, 1, 1024), stored(300, 1, 1024, dtype)
    exact = products(queries, rows)
    single = queries.flatten(1) @ rows.float().flatten(1).T
    scores, indices = _cuda.score_topk(queries, rows, 300, None, True, 0)
    error = (torch.empty_like(scores).scatter(1, indices, scores) - exact).abs().max()
    assert error <= 2 * (single - exact).abs().max() + 1e-7 * exact.abs().max()


@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("size", [2.0**-100, 2.0**-20, 2.0**20, 2.0**100])
def test_large_and_small_numbers(dtype, size):
    """Queries of any size, and numbers in one query that differ by up to 2³⁰."""
    spread = 2.0 ** torch.linspace(-30, 0, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(3))]
    check(size * spread * randn(3, 2, 64), stored(150, 2, 64, dtype), 5)


@pytest.mark.parametrize("dtype", ROW_TYPES)
def test_scores_do_not_depend_on_company(dtype):
    """The same bits among any queries and rows; slices are other ones then, too."""
    queries, rows, scales = randn(40, 2, 100), stored(700, 2, 100, dtype), randn(700, 2, seed=2)

    def everything(queries, rows, scales):
        scores, indices = _cuda.score_topk(queries, rows, len(rows), scales, True, 0)
        return torch.empty_like(scores).scatter(1, indices, scores)

    whole = everything(queries, rows, scales)
    assert torch.equal(everything(queries[5:9], rows, scales), whole[5:9])
    assert torch.equal(everything(queries.flip(0), rows, scales).flip(0), whole)
    assert torch.equal(everything(queries, rows[130:500], scales[130:500]), whole[:, 130:500])


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("multiprocessors", [1, 2, 30])
def test_slices_and_shards_merge(largest, multiprocessors, monkeypatch):
    monkeypatch.setattr(_cuda, "_multiprocessors", lambda device: multiprocessors)
    queries, rows = randn(20, 1, 24), randn(2000, 1, 24, seed=1)
    rows[1000:] = rows[:1000]  # every score is there twice
    whole = _cuda.score_topk(queries, rows, 60, None, largest, 0)
    pieces = range(0, 2000, 250)
    parts = [_cuda.score_topk(queries, rows[a : a + 250], 60, None, largest, a) for a in pieces]
    merged = merge_topk(parts, 60, largest)
    assert torch.equal(merged[1], whole[1]) and torch.equal(merged[0], whole[0])
    pairs = whole[1].view(20, 30, 2)
    assert torch.equal(pairs[:, :, 0] + 1000, pairs[:, :, 1])


@pytest.mark.parametrize("order", [1, -1])
def test_ten_thousand_results(order):
    """More than a tile's and fewer than all rows, which beat all before them, or none."""
    rows = order * torch.arange(1.0, 10301)[:, None, None]
    scores, indices = _cuda.score_topk(torch.ones(2, 1, 1), rows, 10000, None, True, 0)
    wanted = torch.arange(10299, 299, -1) if order == 1 else torch.arange(10000)
    assert torch.equal(indices, wanted.expand(2, -1)) and torch.equal(scores, rows[indices, 0, 0])


def test_little_room(monkeypatch):
    """Survivors of one slice, if there is no room for those of more."""
    queries, rows = randn(5, 1, 30), randn(3000, 1, 30, seed=1)
    plenty = check(queries, rows, 20)
    monkeypatch.setattr(_cuda, "SURVIVORS", 1)
    assert torch.equal(check(queries, rows, 20)[1], plenty[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("Q", [3, 30])
def test_numbers_that_are_not_finite(dtype, Q):
    """Scores are those of the definition, infinite or NaN."""
    queries, rows = randn(Q, 2, 40), stored(40, 2, 40, dtype)
    rows[3, 0, 5], rows[9, 1, 39], rows[17, 0, 0] = torch.inf, -torch.inf, torch.nan
    rows[20, 0, 1], rows[20, 1, 2] = torch.inf, -torch.inf
    scales = randn(40, 2, seed=2)
    scores, indices = _cuda.score_topk(queries, rows, 40, scales, True, 0)
    found = torch.empty_like(scores).scatter(1, indices, scores)
    wanted = products(queries, rows, scales).float()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.isinf(), wanted.isinf()) and wanted.isinf().any()
    assert torch.equal(found[wanted.isinf()], wanted[wanted.isinf()])


# ---- mixed_topk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mixing", [0, 0.9])
@pytest.mark.parametrize(("Q", "d"), [(1, 16), (5, 16), (14, 16), (40, 16), (30, 72), (70, 90), (100, 40)])
def test_mixed_topk_is_the_dense_definition(dtype, mixing, Q, d):
    """Few queries and many, in one part and several, of one group and several."""
    queries, rows = randn(Q, 3, d), randn(150, 3, d, seed=1, dtype=dtype)
    check_mixed(queries, rows, mixing, k=20, backend="cuda", largest=Q % 2 == 0)


@pytest.mark.parametrize("mixing", [0.5, 0.99])
@pytest.mark.parametrize("Q", [1, 20, 64])
@pytest.mark.parametrize("norm", [1, 30])
def test_rows_that_are_queries_score_one(mixing, Q, norm):
    L, d = 2, 48
    rows = (norm * Q**0.5 * randn(150, L, d, seed=1) / (L * d) ** 0.5).half()
    scores, indices = check_mixed(rows[:Q].float(), rows, mixing, backend="cuda")
    own = torch.empty_like(scores).scatter(1, indices - 5, scores).diagonal()
    assert ((own - 1).abs() <= 1e-5).all()


@pytest.mark.parametrize("k", [1, 40, 70])
@pytest.mark.parametrize("largest", [True, False])
def test_rows_that_need_float64(k, largest):
    """Sixty of seventy rows lie in the span of the queries."""
    queries, rows = 30 * randn(5, 2, 16), randn(70, 2, 16, seed=1)
    rows[5:65] = torch.einsum("nq,qld->nld", randn(60, 5, seed=2), queries)
    check_mixed(queries, rows, 0.9, k=k, largest=largest, backend="cuda")


@pytest.mark.parametrize("Q", [3, 30])
@pytest.mark.parametrize("per_block", [False, True])
def test_mixed_bytes(Q, per_block):
    rows, scales = stored(200, 3, 50, torch.int8), randn(200, 3 if per_block else 1, seed=2).abs()
    wide = rows.float() * scales[:, :, None]
    queries = randn(Q, 3, 50)
    norms, scales = squared_norms(wide), scales if per_block else scales[:, 0]
    scores, indices = tk.mixed_topk(queries, rows, norms, 200, 0.9, scales=scales, backend="cuda")
    found = torch.empty_like(scores).scatter(1, indices, scores)
    assert (found - exact_mixed(queries, wide, 0.9)).abs().max() <= 1e-5


@pytest.mark.parametrize("Q", [2, 30])
def test_mixed_shards_merge(Q):
    """Bit for bit."""
    queries, rows = randn(Q, 2, 16), randn(600, 2, 16, seed=1)
    rows[300:] = rows[:300]
    norms = squared_norms(rows)
    whole = tk.mixed_topk(queries, rows, norms, 20, 0.9, backend="cuda")
    pieces = range(0, 600, 150)
    parts = [
        tk.mixed_topk(queries, rows[a : a + 150], norms[a : a + 150], 20, 0.9, start=a, backend="cuda")
        for a in pieces
    ]
    scores, indices = merge_topk(parts, 20)
    assert torch.equal(indices, whole[1]) and torch.equal(scores, whole[0])


def test_mixed_zeros_ties_and_nans():
    queries, rows = randn(3, 2, 16), randn(6, 2, 16, seed=1).repeat(2, 1, 1)
    queries[1] = 0
    rows[[2, 7]], rows[4] = torch.nan, 0
    scores, indices = tk.mixed_topk(queries, rows, squared_norms(rows), 12, 0.9, backend="cuda")
    assert torch.equal(indices[:, 10:], torch.tensor([[2, 7]]).expand(3, -1)) and scores[:, 10:].isnan().all()
    found = torch.empty_like(scores).scatter(1, indices, scores)
    assert (found[:, 4] == 0).all() and (found[1, :10].nan_to_num() == 0).all()
    assert torch.equal(indices[1, :10], torch.tensor([0, 1, 3, 4, 5, 6, 8, 9, 10, 11]))
    for row in indices[[0, 2]].tolist():
        for n in (0, 3, 5):
            assert row.index(n + 6) == row.index(n) + 1


# ---- Operands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ROW_TYPES)
def test_planes_add_up(dtype):
    kind, count = _operands.PLANES[dtype]
    x = randn(1000) * 2.0 ** torch.randint(-10, 0, (1000,), generator=torch.Generator().manual_seed(4))
    x *= _operands.exponents(x[None, None], dtype)[0]
    planes = _operands.split(x, kind, count)
    lost = (sum(plane.double() for plane in planes) - x.double()).abs()
    relative = 0 if kind == torch.bfloat16 else 2.0**-23
    smallest = 2.0**-25 if kind == torch.float16 else 0
    assert (lost <= relative * x.double().abs() + smallest).all()
    if kind == torch.float32:  # tf32
        assert all((plane.view(torch.int32) & 0x1FFF == 0).all() for plane in planes)


def test_exponents():
    largest = torch.tensor([0.0, 1.0, 3.9, 2.0**-149, 3e38])
    powers = _operands.exponents(largest[:, None, None], torch.float16)[:, 0]
    assert (largest * powers < 2**15).all() and (powers.frexp()[0] == 0.5).all()
    assert torch.equal(powers[:3], torch.tensor([1.0, 2.0**14, 2.0**13]))
    assert (_operands.exponents(largest[:, None, None], torch.float32) == 1).all()


def test_room_that_does_not_suffice():
    keys, rows = torch.empty(1000, dtype=torch.int64), torch.zeros(300, 1, 8)
    survivors = {"keys": keys.data_ptr(), "Q": 1, "k": 10, "largest": True}
    for slices, capacity in [(1, 137), (4, 1000)]:
        with pytest.raises((RuntimeError, ValueError), match="room"):
            _C.cuda_score_topk(
                rows=_cuda._rows_at(rows, None),
                queries=rows.data_ptr(),
                operand=rows.data_ptr(),
                query_scales=rows.data_ptr(),
                columns=16,
                survivors=_C.CudaSurvivors(**survivors, slices=slices, capacity=capacity),
                stream=0,
            )
