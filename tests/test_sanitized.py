"""The C++ entry points under AddressSanitizer and UndefinedBehaviorSanitizer, on arrays that end where they must."""

import itertools

import pytest
import torch
from sanitized_driver import LEVELS, MEMORY, SanitizedDriver
from test_gradient import FORMS, Case, assert_accurate
from test_other_processors import ELEMENTS, ROW_TYPES

import trackstar_kernels as tk
from trackstar_kernels import _C
from trackstar_kernels._codes import code_size
from trackstar_kernels.encode._trellis import pack_best_codes
from trackstar_kernels.scoring import _reference
from trackstar_kernels.scoring._hessian import Hessian, inverse_root

pytestmark = pytest.mark.slow

NARROW = ["int8", "int4", "sign"]
# N, L, d, k and threads: 1 and primes, rows that end within a vector, k = N, blocks longer than a chunk.
SHAPES = ((1, 1, 1, 1, 1), (65, 2, 33, 9, 3), (131, 3, 97, 131, 1), (70, 1, 259, 3, 4))
ROUNDED = ((2100, 2, 33, 3, 2), (2100, 1, 512, 9, 1))
"""As many rows as are worth rounding to bytes first, where there are many queries."""

LENGTHS = (
    ([1], (1, 1, 1, 1), 1),
    ([0, 5, 1, 0, 3], (7, 5, 3, 2), 3),
    ([257, 0, 31], (193, 97, 17, 7), 2),
    ([1025, 2], (31, 53, 5, 13), 1),
    ([0, 0], (3, 5, 2, 2), 2),
    ([], (3, 5, 2, 2), 1),
)


def with_kernel(kernel):
    """The levels of this machine that have a kernel of their own."""
    return [name for name in LEVELS if name in _C.available_isas() and kernel in LEVELS[name][2]]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return SanitizedDriver(tmp_path_factory.mktemp("sanitized"), MEMORY)


def number_of(level):
    return list(LEVELS).index(level)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(rows, dtype):
    """Codes and scales of rows in any dtype, and the squared norms that the definition takes."""
    if dtype in NARROW:
        return tk.encode_rows(rows, None, dtype)
    codes = rows.to(getattr(torch, dtype))
    return codes, None, codes.float().square().sum(2)


def best(exact, k, largest):
    return exact.sort(dim=1, descending=bool(largest)).values[:, :k]


def assert_close(scores, exact):
    assert (scores - exact).abs().max() <= 1e-5 * max(1, exact.abs().max())


@pytest.mark.parametrize("level", with_kernel("trellis_kernel"))
@pytest.mark.parametrize(("N", "d", "threads"), [(1, 1, 1), (7, 33, 3), (131, 97, 2), (2, 4100, 4)])
def test_codes_of_int4(driver, level, N, d, threads):
    unit = normal(N, 1, d, seed=d) / 5
    codes = torch.empty(N, 1, code_size(d, torch.uint8), dtype=torch.uint8)
    options = ("isa", number_of(level), "threads", threads)
    driver.run(*options, "pack_best_codes", N, d, unit.clamp(-1, 1), results=[codes])
    assert torch.equal(codes, pack_best_codes(unit.clamp(-1, 1)))


@pytest.mark.parametrize("level", with_kernel("coded_kernel"))
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("Q", [1, 2, 3, 4, 7, 12, 33])
def test_narrow_rows(driver, level, dtype, Q):
    """Odd shapes, with and without scales, the largest and the smallest."""
    for (N, L, d, k, threads), scaled, largest in itertools.product(SHAPES, (True, False), (1, 0)):
        queries, rows = normal(Q, L, d, seed=N), normal(N, L, d, seed=N + 1)
        codes, scales, norms = tk.encode_rows(rows, None, dtype)
        options = ("isa", number_of(level), "threads", threads)
        sizes = (Q, k, N, L, d, ROW_TYPES.index(dtype))
        scores, positions = torch.empty(Q, k), torch.empty(Q, k, dtype=torch.int64)
        arrays = (queries, codes, scales if scaled else None)
        driver.run(*options, "score_topk", *sizes, largest, *arrays, results=[scores, positions])
        decoded = tk.decode_rows(codes, scales if scaled else None, d)
        assert_close(scores, best(queries.double().flatten(1) @ decoded.double().flatten(1).T, k, largest))
        if not scaled:
            continue
        rescored = torch.empty(Q, dtype=torch.int64)
        results = [scores, positions, rescored]
        driver.run(
            *options, "rescored_topk", *sizes, 1, largest, *arrays, rows.half(), norms, results=results
        )
        exact = queries.double().flatten(1) @ rows.half().double().flatten(1).T
        assert_close(scores, best(exact, k, largest))
        assert ((rescored >= k) & (rescored <= N)).all()


@pytest.mark.parametrize("level", with_kernel("scoring_kernel"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("Q", [1, 4, 5, 18, 33])
def test_float_rows(driver, level, dtype, Q):
    for N, L, d, k, threads in SHAPES + ROUNDED * (Q > 18):
        queries, rows = normal(Q, L, d, seed=N), normal(N, L, d, seed=N + 1).to(dtype)
        scores, positions = torch.empty(Q, k), torch.empty(Q, k, dtype=torch.int64)
        kind = ROW_TYPES.index(str(dtype).removeprefix("torch."))
        arguments = (Q, k, N, L, d, kind, 1, queries, rows, None)
        options = ("isa", number_of(level), "threads", threads)
        driver.run(*options, "score_topk", *arguments, results=[scores, positions])
        assert_close(scores, best(queries.double().flatten(1) @ rows.double().flatten(1).T, k, True))


def prepared(queries, mixing):
    """A task's Hessian, and its arrays as the kernels take them: factors, combinations and weights."""
    hessian = Hessian(queries, mixing, slice(None))
    factors, combine, squares = zip(*hessian.blocks(), strict=True)
    return hessian, (
        torch.stack(factors).float(),
        torch.stack(combine).float(),
        inverse_root(sum(squares)).float(),
    )


@pytest.mark.parametrize("level", with_kernel("coded_kernel"))
@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("Q", [1, 33, 120])
def test_mixed(driver, level, dtype, Q):
    """Fewer and more queries than dimensions, the largest and the smallest."""
    if dtype not in NARROW and level not in with_kernel("scoring_kernel"):
        pytest.skip("the level has no kernel for floats of its own")
    options = ("isa", number_of(level))
    for largest, (N, L, d, k, threads) in zip((1, 0, 1, 0), SHAPES, strict=True):
        queries, rows = normal(Q, L, d, seed=N), normal(N, L, d, seed=N + 1)
        codes, scales, norms = stored(rows, dtype)
        hessian, task = prepared(queries, 0.5)
        sizes, kind = (N, L, d, hessian.rank), ROW_TYPES.index(dtype)
        scores, positions = torch.empty(Q, k), torch.empty(Q, k, dtype=torch.int64)
        doubtful = torch.empty(N, dtype=torch.bool)
        driver.run(
            *(*options, "threads", threads, "mixed_topk", Q, k, *sizes, kind, largest),
            *(hessian.base, hessian.sign, 0.0, *task, codes, scales, norms),
            results=[scores, positions, doubtful],
        )
        assert not doubtful.any()
        exact, _ = _reference.mixed_topk(queries.double(), codes, norms, k, 0.5, scales, bool(largest), 0)
        assert_close(scores, exact)
        if scales is None:
            continue
        numerators, squares, inner = (
            torch.empty(N, Q),
            *(torch.empty(N, dtype=torch.float64) for _ in range(2)),
        )
        driver.run(
            *(*options, "threads", threads, "mixed_parts", Q, *sizes, kind),
            *(hessian.base, hessian.sign, *task, codes, scales),
            results=[numerators, squares, inner],
        )
        decoded = tk.decode_rows(codes, scales, d, torch.float64)
        assert torch.allclose(squares, decoded.square().sum((1, 2)), rtol=1e-5)
        lost = (norms.double().sum(1) - squares).clamp_min(0)
        assert_close(best((numerators * inverse_root(inner + lost)[:, None]).T, k, largest), exact)


@pytest.mark.parametrize("level", with_kernel("coded_kernel"))
@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("Q", [1, 33])
def test_rows_of_nothing_sensible(driver, level, dtype, Q):
    """NaN, infinities, huge and tiny numbers in rows, scales and norms: NaN scores come last."""
    N, L, d, k = 131, 2, 33, 131
    options, kind = ("isa", number_of(level), "threads", 2), ROW_TYPES.index(dtype)
    queries, rows = normal(Q, L, d, seed=0), normal(N, L, d, seed=1)
    codes, scales, norms = stored(rows, dtype)
    strange = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45, -0.0])
    if scales is None:
        scales = torch.ones(N, L)
        codes[::3].flatten()[:: d // 2] = torch.nan
        codes[1 : 1 + len(strange), 0, d // 2] = strange.to(codes.dtype)
    else:
        codes.view(torch.uint8)[::5] = 0x80  # -128, -8 and minus zero
    scales[10 : 10 + len(strange), 1] = strange
    norms[20 : 20 + len(strange), 0] = strange
    results = [torch.empty(Q, k), torch.empty(Q, k, dtype=torch.int64)]
    arrays = (queries, codes, scales)
    sizes = (Q, k, N, L, d, kind)
    driver.run(*options, "score_topk", *sizes, 1, *arrays, results=results)
    assert_nan_last(*results)
    if dtype in NARROW:
        found = [*results, torch.empty(Q, dtype=torch.int64)]
        driver.run(*options, "rescored_topk", *sizes, 0, 1, *arrays, rows, norms, results=found)
        assert_nan_last(*results)
    hessian, task = prepared(queries, 0.9)
    doubtful = torch.empty(N, dtype=torch.bool)
    driver.run(
        *(
            *options,
            "mixed_topk",
            *sizes[:5],
            hessian.rank,
            kind,
            1,
            hessian.base,
            hessian.sign,
            hessian.trusted,
        ),
        *(*task, codes, scales, norms),
        results=[*results, doubtful],
    )
    known = N - int(doubtful.sum())
    assert known > N // 2
    assert_nan_last(*(result[:, :known] for result in results))


def assert_nan_last(scores, positions):
    """Every row once, numbers in descending order, then NaN."""
    assert all(len(set(row)) == len(row) for row in positions.tolist())
    keys = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    assert (keys[:, 1:] <= keys[:, :-1]).all()
    assert (scores.isnan().int().diff() >= 0).all()


@pytest.mark.parametrize("level", with_kernel("gradient_kernel"))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_gradients(driver, level, form, dtype):
    """All forms, with examples of no tokens and batches of no examples."""
    for lengths, sizes, threads in LENGTHS:
        case = Case(lengths, sizes, **form, dtype=dtype)
        got = driver.project_gradients(case, "isa", number_of(level), "threads", threads)
        if lengths:
            assert_accurate(case, got)


@pytest.mark.parametrize("level", with_kernel("gradient_kernel"))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_gradients_of_nothing_sensible(driver, level, form, dtype):
    """NaN and infinities reach their own example's row and no other."""
    case = Case([5, 3, 4], (7, 5, 3, 2), **form, dtype=dtype)
    case.activations[1], case.output_grads[10] = torch.nan, torch.inf
    got = driver.project_gradients(case, "isa", number_of(level))
    clean = Case([5, 3, 4], (7, 5, 3, 2), **form, dtype=dtype)
    assert got[0].isnan().all() and not got[2].isfinite().all()
    assert torch.equal(got[1], driver.project_gradients(clean, "isa", number_of(level))[1])
