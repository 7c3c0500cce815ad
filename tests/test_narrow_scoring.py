"""score_topk and mixed_topk on int8, int4 and sign rows, which stand for scale · code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import (
    BACKENDS,
    NATIVE,
    check_topk,
    exact_mixed,
    exact_scores,
    float32_tolerance,
    on_backend,
    randn,
    threads,
)

import trackstar_kernels as tk
from trackstar_kernels import _C
from trackstar_kernels._codes import code_size

native_only = pytest.mark.parametrize(
    "backend", [case for case in NATIVE if case.startswith("cpu")], indirect=True
)
narrow = pytest.mark.parametrize("dtype", ["int8", "int4", "sign"])


@pytest.fixture(params=BACKENDS)
def backend(request):
    with on_backend(request.param) as name:
        yield name


def encoded(N, L, d, dtype, seed=1):
    """Codes, scales and squared norms of random rows."""
    return tk.encode_rows(randn(N, L, d, seed=seed), None, dtype)


def decoded_scores(queries, codes, scales):
    """Exact scores (Q, N) and what float32 may miss them by."""
    rows = tk.decode_rows(codes, scales, queries.shape[2])
    numbers = tk.decode_rows(codes, None, queries.shape[2])
    return exact_scores(queries, numbers, scales), float32_tolerance(queries, rows)


@narrow
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("Q", [1, 3, 4, 5, 16, 33])
def test_score_topk_is_exact(backend, dtype, largest, Q):
    queries = randn(Q, 3, 97)
    codes, scales, _ = encoded(157, 3, 97, dtype)
    result = tk.score_topk(queries, codes, 7, scales=scales, largest=largest, start=9, backend=backend)
    exact, tolerance = decoded_scores(queries, codes, scales)
    check_topk(result, exact, 7, largest, tolerance, start=9)


@narrow
@pytest.mark.parametrize("shape", ["none", "rows", "flat"])
def test_scales_and_shapes(backend, dtype, shape):
    """No scales, a scale for each row, and queries without blocks."""
    d = 71
    queries = randn(6, 2, d)
    codes, scales, _ = encoded(60, 2, d, dtype)
    given_scales = {"none": None, "rows": scales[:, 0], "flat": scales[:, 0]}[shape]
    if shape == "flat":
        queries, codes = queries[:, :1], codes[:, :1]
        result = tk.score_topk(queries[:, 0], codes[:, 0], 9, scales=given_scales, backend=backend)
    else:
        result = tk.score_topk(queries, codes, 9, scales=given_scales, backend=backend)
    ones = torch.ones(60, codes.shape[1])
    exact, tolerance = decoded_scores(queries, codes, ones if given_scales is None else ones * scales[:, :1])
    check_topk(result, exact, 9, True, tolerance)


@given(
    dtype=st.sampled_from(["int8", "int4", "sign"]),
    Q=st.sampled_from([1, 2, 4, 5, 8, 17, 31, 40]),
    N=st.integers(1, 120),
    L=st.integers(1, 3),
    d=st.sampled_from([1, 2, 3, 5, 8, 13, 16, 31, 32, 33, 64, 97, 255, 256, 257, 521, 2053]),
    largest=st.booleans(),
    scaled=st.booleans(),
    part=st.floats(0, 1),
    isa=st.sampled_from(_C.available_isas()),
)
def test_odd_shapes(dtype, Q, N, L, d, largest, scaled, part, isa):
    k = max(1, round(part * N))
    queries = randn(Q, L, d)
    codes, scales, _ = encoded(N, L, d, dtype)
    scales = scales if scaled else None
    with on_backend(f"cpu:{isa}"):
        result = tk.score_topk(queries, codes, k, scales=scales, largest=largest)
    exact, tolerance = decoded_scores(queries, codes, scales)
    check_topk(result, exact, k, largest, tolerance)


def alone(queries, codes, scales, k, largest=True):
    """The same numbers as float32 rows, one query at a time."""
    numbers = tk.decode_rows(codes, None, queries.shape[2])
    found = [tk.score_topk(query[None], numbers, k, scales=scales, largest=largest) for query in queries]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@native_only
@narrow
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("Q", [1, 3, 11, 40])
def test_scores_have_the_bits_of_float_rows(backend, dtype, largest, Q):
    """Whatever the other queries and the threads."""
    queries = randn(Q, 3, 97)
    codes, scales, _ = encoded(900, 3, 97, dtype)
    wanted = alone(queries, codes, scales, 30, largest)
    for n in (1, 3):
        with threads(n):
            found = tk.score_topk(queries, codes, 30, scales=scales, largest=largest)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@native_only
@narrow
@pytest.mark.parametrize("Q", [1, 12])
@pytest.mark.parametrize("k", [1, 25])
def test_rows_that_are_nearly_tied(backend, dtype, Q, k):
    """Their scores differ by less than rounding the queries may change, and queries are rounded as badly as can be."""
    d = 256
    queries = torch.full((Q, 1, d), 1.0)
    queries[:, :, 1:] = (
        torch.randint(0, 40, (Q, 1, d - 1), generator=torch.Generator().manual_seed(0)) + 0.5
    ) / 127
    base = tk.decode_rows(*encoded(1, 1, d, dtype)[:2], d)
    rows = base.repeat(2000, 1, 1)
    # Each row differs in a few places, by what makes hardly a difference to its score.
    for n in range(1, 2000):
        rows[n, 0, torch.randperm(d, generator=torch.Generator().manual_seed(n))[:2]] *= -1
    codes, scales, _ = tk.encode_rows(rows, None, dtype)
    scales = scales * (1 + 1e-4 * randn(2000, 1, seed=3))
    found = tk.score_topk(queries, codes, k, scales=scales)
    wanted = alone(queries, codes, scales, k)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@native_only
def test_bytes_that_encode_rows_does_not_make(backend):
    """-128 of int8."""
    queries = randn(9, 1, 64)
    codes = torch.full((40, 1, 64), -128, dtype=torch.int8)
    codes[::2, :, :5] = 1
    found = tk.score_topk(queries, codes, 7)
    wanted = alone(queries, codes, None, 7)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@given(
    seed=st.integers(0, 2**31),
    Q=st.sampled_from([1, 2, 4, 9]),
    d=st.sampled_from([1, 31, 33, 63, 64, 97, 128, 321]),
    isa=st.sampled_from(_C.available_isas()),
)
def test_int4_of_any_bytes(seed, Q, d, isa):
    queries = randn(Q, 2, d)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (50, 2, code_size(d, torch.uint8)), dtype=torch.uint8, generator=generator)
    scales = randn(50, 2, seed=2)
    with on_backend(f"cpu:{isa}"):
        found = tk.score_topk(queries, codes, 7, scales=scales)
        wanted = alone(queries, codes, scales, 7)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@narrow
@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1e20, 1e36])
@pytest.mark.parametrize("Q", [2, 30])
def test_very_small_and_very_large_scales(dtype, factor, Q):
    queries = randn(Q, 2, 40)
    codes, scales, _ = encoded(200, 2, 40, dtype)
    found = tk.score_topk(queries, codes, 6, scales=factor * scales)
    wanted = alone(queries, codes, factor * scales, 6)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@narrow
def test_ten_thousand_results(dtype):
    queries = randn(2, 1, 32)
    codes, scales, _ = encoded(12_000, 1, 32, dtype)
    found = tk.score_topk(queries, codes, 10_000, scales=scales)
    wanted = alone(queries, codes, scales, 10_000)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@native_only
@narrow
@pytest.mark.parametrize("Q", [2, 20])
def test_reads_codes_where_they_are(backend, dtype, Q):
    """Inside wider rows."""
    queries = randn(Q, 2, 45)
    codes, scales, _ = encoded(70, 2, 45, dtype)
    wanted = tk.score_topk(queries, codes, 9, scales=scales)
    room = torch.full((72, codes[0].numel() + 5), -1 if dtype != "int4" else 255, dtype=codes.dtype)
    room[1:71, : codes[0].numel()] = codes.flatten(1)
    inside = room[1:71, : codes[0].numel()].unflatten(1, codes.shape[1:])
    found = tk.score_topk(queries, inside, 9, scales=scales)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


LEVELS = [
    [-127, -92, -71, -55, -42, -30, -19, -8, 2, 13, 24, 36, 48, 62, 80, 108],
    [-108, -80, -62, -48, -36, -24, -13, -2, 8, 19, 30, 42, 55, 71, 92, 127],
]
"""Those of int4 by the last code's lowest bit."""


def codes_of_every_value(dtype):
    """One row for each value of a single code; for int4, after codes of each lowest bit."""
    if dtype == "int8":
        return torch.arange(-127, 128, dtype=torch.int8)[:, None, None], torch.arange(-127, 128)
    if dtype == "int4":
        multiplier, first, second, third = torch.meshgrid(
            torch.arange(16), torch.arange(14, 16), torch.arange(4, 6), torch.arange(16), indexing="ij"
        )
        codes = (
            torch.stack([multiplier, first | second << 4, third], dim=-1).to(torch.uint8).reshape(-1, 1, 3)
        )
        levels = torch.tensor(LEVELS)
        numbers = [
            (levels[last & 1, code ^ other & 1] * (multiplier + 1) + 8).div(16, rounding_mode="floor")
            for code, last, other in (
                (first, 0 * first, 0 * first),
                (second, first, 0 * first),
                (third, second, first),
            )
        ]
        return codes, (numbers[0] + 256 * numbers[1] + 2**16 * numbers[2]).flatten()
    words = torch.arange(2**8, dtype=torch.int32)
    return words[:, None, None], sum((1 - 2 * (words >> i & 1)) * 2**i for i in range(8))


@narrow
@pytest.mark.parametrize("Q", [1, 6])
def test_every_code(backend, dtype, Q):
    codes, values = codes_of_every_value(dtype)
    weights = {"int8": [1.0], "int4": [1.0, 2.0**8, 2.0**16], "sign": [2.0**i for i in range(8)]}[dtype]
    queries = torch.tensor(weights).expand(Q, 1, -1)
    scores, indices = tk.score_topk(queries, codes, len(codes), backend=backend)
    assert torch.equal(torch.empty_like(scores).scatter(1, indices, scores), values.float().expand(Q, -1))


@narrow
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("Q", [1, 20])
@pytest.mark.parametrize("threads_", [1, 3])
def test_ties_go_to_the_smaller_index(backend, dtype, largest, Q, threads_):
    """Many equal rows, and rows of zeros with either sign: whole numbers, whose sums are exact in any order."""
    codes = tk.encode_rows(torch.ones(1000, 1, 16), None, dtype)[0]
    values = torch.tensor([0.0, -1.0, 2.0])[torch.arange(1000) % 3]
    scales = values[:, None].clone()
    scales[3] = -0.0
    with threads(threads_):
        _, indices = tk.score_topk(
            torch.ones(Q, 1, 16), codes, 700, scales=scales, largest=largest, backend=backend
        )
    assert torch.equal(indices, values.argsort(stable=True, descending=largest)[:700].expand(Q, -1))


@narrow
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("Q", [1, 20])
@pytest.mark.parametrize("numbers", [50, 700])
def test_nan_scales_come_last(backend, dtype, largest, Q, numbers):
    """After every number, even infinity on the wrong side; among themselves by index."""
    N = 900
    queries = randn(Q, 1, 24).abs()
    codes = tk.encode_rows(torch.ones(N, 1, 24), None, dtype)[0]
    scales = torch.full((N, 1), torch.nan)
    good = torch.randperm(N, generator=torch.Generator().manual_seed(3))[:numbers]
    scales[good] = randn(numbers, 1, seed=1)
    worst = good.min()
    scales[worst] = -torch.inf if largest else torch.inf
    scores, indices = tk.score_topk(queries, codes, 300, scales=scales, largest=largest, backend=backend)
    shown = min(numbers, 300)
    assert not scores[:, :shown].isnan().any() and scores[:, shown:].isnan().all()
    if numbers < 300:
        assert (indices[:, numbers - 1] == worst).all()
        mask = torch.ones(N, dtype=torch.bool)
        mask[good] = False
        assert torch.equal(indices[:, numbers:], mask.nonzero()[: 300 - numbers, 0].expand(Q, -1))


# ---- mixed_topk --------------------------------------------------------------------------------------------


def check_mixed(queries, codes, scales, norms, mixing, k, backend="cpu", largest=True):
    result = tk.mixed_topk(
        queries, codes, norms, k, mixing, scales=scales, largest=largest, start=5, backend=backend
    )
    exact = exact_mixed(queries, codes, mixing, scales, norms)
    check_topk(result, exact, k, largest, torch.full_like(exact, 1e-5), start=5)
    return result


@narrow
@pytest.mark.parametrize("mixing", [0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("Q", [1, 5, 13, 16, 40])
def test_mixed_topk_is_the_dense_definition(backend, dtype, mixing, Q):
    """Fewer queries than block dimensions, as many, and more."""
    queries = randn(Q, 3, 16)
    codes, scales, norms = encoded(211, 3, 16, dtype)
    check_mixed(queries, codes, scales, norms, mixing, 11, backend, largest=Q % 2 == 0)


@narrow
@pytest.mark.parametrize("mixing", [0, 0.5, 0.99])
@pytest.mark.parametrize("Q", [1, 20, 64])
def test_mixed_rows_that_are_queries(dtype, mixing, Q):
    """Where the norm cancels to what narrowing took from the row."""
    rows = 30 * Q**0.5 * randn(150, 2, 48, seed=1) / 96**0.5
    codes, scales, norms = tk.encode_rows(rows, None, dtype)
    check_mixed(rows[:Q], codes, scales, norms, mixing, 150)


@narrow
@pytest.mark.parametrize("mixing", [0, 0.9])
def test_mixed_zeros_score_zero(backend, dtype, mixing):
    queries, rows = randn(3, 2, 16), randn(10, 2, 16, seed=1)
    queries[1] = 0
    rows[4] = 0
    codes, scales, norms = tk.encode_rows(rows, None, dtype)
    scores, indices = tk.mixed_topk(queries, codes, norms, 10, mixing, scales=scales, backend=backend)
    found = torch.empty_like(scores).scatter(1, indices, scores)
    assert (found[1] == 0).all() and (found[:, 4] == 0).all()
    assert (found[0].abs() > 0).sum() == 9
