import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trackstar_kernels import encode_rows
from trackstar_kernels.encode import BACKENDS


def draw(n, blocks, size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, blocks, size, generator=generator, dtype=torch.float64)
    whiteners = torch.randn(blocks, size, size, generator=generator, dtype=torch.float64)
    return rows.to(dtype), whiteners.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS["cpu"])
@given(n=st.integers(0, 9), blocks=st.integers(1, 5), size=st.sampled_from([1, 2, 7, 16, 31]))
def test_agrees_with_the_definition(backend, n, blocks, size):
    rows, whiteners = draw(n, blocks, size)
    exact = torch.stack([rows[:, b] @ whiteners[b].T for b in range(blocks)], dim=1)
    kept = (exact.clone(), exact.clone())
    reference = encode_rows(rows.float(), whiteners.float(), "float32", backend="reference")[0]
    codes, scales, squared_norms = encode_rows(rows.float(), whiteners.float(), "float32", backend=backend)
    assert scales is None
    assert codes.dtype == torch.float32
    bound = 2 * (reference - exact).norm() + 1e-6
    assert (codes - exact).norm() <= bound
    torch.testing.assert_close(squared_norms.double(), kept[0].square().sum(2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS["cpu"])
def test_float16_narrows_once_and_keeps_the_true_norms(backend):
    rows, whiteners = draw(20, 3, 16, dtype=torch.float32)
    wide, _, norms = encode_rows(rows, whiteners, "float32", backend=backend)
    narrow, _, kept = encode_rows(rows, whiteners, torch.float16, backend=backend)
    assert torch.equal(narrow, wide.half())
    assert torch.equal(norms, kept)


def test_without_whiteners_rows_stay():
    rows, _ = draw(4, 2, 3, dtype=torch.float32)
    codes, _, norms = encode_rows(rows, None, "float32")
    assert torch.equal(codes, rows)
    torch.testing.assert_close(norms, rows.square().sum(2))


@pytest.mark.parametrize(
    ("rows", "whiteners", "dtype", "error", "message"),
    [
        (torch.ones(2, 3), None, "float32", ValueError, r"rows must have shape \(N, L, d\), got \(2, 3\)"),
        (
            torch.ones(2, 3, 4),
            torch.ones(3, 4, 5),
            "float32",
            ValueError,
            r"whiteners must have shape \(3, 4, 4\)",
        ),
        (
            torch.ones(2, 3, 4),
            torch.ones(3, 4, 4).double(),
            "float32",
            TypeError,
            "whiteners must have dtype float32",
        ),
        (torch.ones(2, 3, 4), None, "int3", ValueError, "dtype must be one of float32, float16; got 'int3'"),
        (torch.full((1, 1, 1), 1e6), None, "float16", ValueError, r"rows\[0\] reaches 1e\+06 in block 0"),
        ([[1.0]], None, "float32", TypeError, "rows must be a torch.Tensor, got list"),
    ],
)
def test_bad_input(rows, whiteners, dtype, error, message):
    with pytest.raises(error, match=message):
        encode_rows(rows, whiteners, dtype)
