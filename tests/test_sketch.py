import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton_device import DEVICE, TRITON, triton_runs

from trackstar_kernels import projection_matrix
from trackstar_kernels.sketch import BACKENDS, KINDS
from trackstar_kernels.sketch._reference import philox

GOLDEN_SIGNS = [[-1, -1, -1, -1, 1, 1, -1, -1, 1], [-1, -1, -1, -1, 1, -1, 1, 1, -1]]
GOLDEN_NORMAL = [
    "0x1.35ba000000000p+0",
    "-0x1.6af7a00000000p-1",
    "0x1.33ec000000000p-5",
    "-0x1.2589800000000p-3",
]
GOLDEN_ROWS = [
    [0, 0, 0, -1, 0, 0, 0, -1, 0],
    [0, 0, 1, 0, 0, 0, -1, 0, 0],
    [0, -1, 0, 0, 0, 0, 0, 0, -1],
    [0, 0, 0, 0, -1, 0, 0, 0, 0],
    [-1, 0, 0, 0, 0, 1, 0, 0, 0],
]
GOLDEN_PLACES = [(0, 15675, -1), (1, 29033, 1), (2, 28681, -1)]  # of 2**16 rows

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[*BACKENDS["cpu"], TRITON])
def backend(request):
    with triton_runs(BACKENDS):
        yield request.param


def words(hexadecimal):
    return [np.array([int(word, 16)], dtype=np.uint64) for word in hexadecimal.split()]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    got = philox(words(counter), tuple(int(word, 16) for word in key.split()))
    assert [int(word[0]) for word in got] == [int(word, 16) for word in expected.split()]


def test_golden_entries(backend):
    """The mapping from seeds to matrices is public: stores depend on it for ever."""
    where = {"backend": backend, "device": DEVICE if backend == "triton" else "cpu"}
    signs = projection_matrix(2, 9, seed=1, stream=2, **where) * math.sqrt(2)
    assert signs.round().tolist() == GOLDEN_SIGNS
    normal = projection_matrix(1, 4, seed=2**64 - 1, stream=2**64 - 1, kind="gaussian", **where)
    assert [value.hex() for value in normal[0].tolist()] == GOLDEN_NORMAL
    sparse = projection_matrix(5, 9, seed=1, stream=2, kind="countsketch", **where)
    assert sparse.tolist() == GOLDEN_ROWS


@pytest.mark.parametrize(
    "backend", [*BACKENDS["cpu"], pytest.param("triton", marks=[*TRITON.marks, pytest.mark.slow])]
)
def test_golden_places_in_many_rows(backend):
    where = {"backend": backend, "device": DEVICE if backend == "triton" else "cpu"}
    with triton_runs(BACKENDS):
        tall = projection_matrix(2**16, 3, seed=2**64 - 1, stream=2**64 - 1, kind="countsketch", **where)
    assert [(col, row, tall[row, col]) for col, row in tall.T.nonzero().tolist()] == GOLDEN_PLACES


@pytest.mark.parametrize("kind", KINDS)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**64 - 1),
    dtype=st.sampled_from(DTYPES),
)
def test_backends_are_bit_identical(kind, rows, cols, seed, stream, dtype):
    options = {"seed": seed, "stream": stream, "kind": kind, "dtype": dtype}
    first, *others = (projection_matrix(rows, cols, **options, backend=b) for b in BACKENDS["cpu"])
    assert first.shape == (rows, cols)
    assert first.dtype == dtype
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("backend", [TRITON], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "cols", "seed", "stream"),
    [(1, 1, 0, 0), (5, 131, 2**64 - 1, 2**63 + 5), (16, 67, 1, 2**40), (7, 1031, 2**32, 16)],
)
def test_the_device_generates_the_same_bits(backend, rows, cols, seed, stream, kind, dtype):
    options = {"seed": seed, "stream": stream, "kind": kind, "dtype": dtype}
    got = projection_matrix(rows, cols, **options, device=DEVICE, backend=backend)
    assert got.device.type == DEVICE
    assert torch.equal(got.cpu(), projection_matrix(rows, cols, **options, backend="reference"))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_an_entry_depends_on_its_place_alone(kind):
    small = projection_matrix(4, 130, seed=5, stream=6, kind=kind, dtype=torch.float64)
    large = projection_matrix(16, 700, seed=5, stream=6, kind=kind, dtype=torch.float64)
    torch.testing.assert_close(small * 2, large[:4, :130] * 4, rtol=1e-15, atol=0)


@pytest.mark.parametrize("rows", [1, 7, 16, 2**20])
def test_countsketch_is_one_sign_in_each_column(rows):
    narrow, wide = (
        projection_matrix(rows, cols, seed=5, stream=6, kind="countsketch", dtype=torch.bfloat16)
        for cols in (13, 40)
    )
    assert torch.equal(narrow, wide[:, :13])
    column, row = wide.T.nonzero().T
    assert torch.equal(column, torch.arange(40))
    assert set(wide[row, column].tolist()) == {1.0, -1.0}


def test_countsketch_draws_every_row_alike():
    rows, cols = 16, 100_000
    p = projection_matrix(rows, cols, seed=3, stream=4, kind="countsketch", dtype=torch.float64)
    expected, deviation = cols / rows, math.sqrt(cols / rows)
    assert ((p != 0).sum(1) - expected).abs().max() < 5 * deviation
    assert p.sum(1).abs().max() < 5 * deviation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(16, 48), (7, 31)])
def test_expectation_of_the_gram_matrix_is_the_identity(kind, shape):
    rows, cols = shape
    draws = 3000
    total = torch.zeros(cols, cols, dtype=torch.float64)
    for stream in range(draws):
        p = projection_matrix(
            rows, cols, seed=11, stream=stream, kind=kind, dtype=torch.float64, backend="reference"
        )
        total += p.T @ p
    error = total / draws - torch.eye(cols, dtype=torch.float64)
    # An entry's standard deviation is at most √(2/rows) per draw; six of them over cols² entries.
    assert error.abs().max() < 6 * math.sqrt(2 / rows / draws)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_and_seeds_are_independent(kind):
    matrices = [
        projection_matrix(1, 20_000, seed=seed, stream=stream, kind=kind, dtype=torch.float64)[0]
        for seed, stream in ((0, 0), (1, 0), (0, 1), (2**32, 0), (0, 2**32))
    ]
    correlations = torch.corrcoef(torch.stack(matrices)) - torch.eye(5, dtype=torch.float64)
    assert correlations.abs().max() < 5 / math.sqrt(20_000)


def test_gaussian_has_normal_moments():
    x = projection_matrix(1, 400_000, seed=3, stream=4, kind="gaussian", dtype=torch.float64)[0]
    assert abs(x.mean()) < 5 / math.sqrt(4e5)
    assert abs(x.square().mean() - 1) < 5 * math.sqrt(2 / 4e5)
    assert abs(x.pow(4).mean() - 3) < 5 * math.sqrt(96 / 4e5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": 0}, ValueError, "rows must be from 1"),
        ({"cols": 2.0}, TypeError, "cols must be an int, got float"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"stream": 2**64}, ValueError, "stream must be from 0"),
        (
            {"kind": "cauchy"},
            ValueError,
            "kind must be one of rademacher, gaussian, countsketch; got 'cauchy'",
        ),
        ({"dtype": torch.int32}, TypeError, "dtype must be one of float16"),
        ({"backend": "triton"}, ValueError, "must be one of numba, reference, got 'triton'"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        projection_matrix(**({"rows": 2, "cols": 3, "seed": 0, "stream": 0} | arguments))
