import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton_device import DEVICE, TRITON, triton_runs

from trackstar_kernels import encode_rows
from trackstar_kernels.encode import BACKENDS


@pytest.fixture(params=[*BACKENDS["cpu"], TRITON])
def backend(request):
    with triton_runs(BACKENDS):
        yield request.param


def encode(backend, rows, whiteners, dtype):
    """encode_rows on the device that tests the backend."""
    device = DEVICE if backend == "triton" else "cpu"
    whiteners = None if whiteners is None else whiteners.to(device)
    codes, scales, squared_norms = encode_rows(rows.to(device), whiteners, dtype, backend=backend)
    return codes.cpu(), scales, squared_norms.cpu()


def draw(n, blocks, size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, blocks, size, generator=generator, dtype=torch.float64)
    whiteners = torch.randn(blocks, size, size, generator=generator, dtype=torch.float64)
    return rows.to(dtype), whiteners.to(dtype)


def assert_agrees(backend, n, blocks, size):
    rows, whiteners = draw(n, blocks, size)
    exact = torch.stack([rows[:, b] @ whiteners[b].T for b in range(blocks)], dim=1)
    kept = (exact.clone(), exact.clone())
    reference = encode_rows(rows.float(), whiteners.float(), "float32", backend="reference")[0]
    codes, scales, squared_norms = encode(backend, rows.float(), whiteners.float(), "float32")
    assert scales is None
    assert codes.dtype == torch.float32
    bound = 2 * (reference - exact).norm() + 1e-6
    assert (codes - exact).norm() <= bound
    torch.testing.assert_close(squared_norms.double(), kept[0].square().sum(2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS["cpu"])
@given(n=st.integers(0, 9), blocks=st.integers(1, 5), size=st.sampled_from([1, 2, 7, 16, 31]))
def test_agrees_with_the_definition(backend, n, blocks, size):
    assert_agrees(backend, n, blocks, size)


@pytest.mark.parametrize("backend", [TRITON], indirect=True)
@pytest.mark.parametrize(("n", "blocks", "size"), [(0, 2, 3), (1, 1, 1), (3, 5, 7), (67, 2, 16), (2, 1, 97)])
def test_the_device_agrees_with_the_definition(backend, n, blocks, size):
    assert_agrees(backend, n, blocks, size)


@pytest.mark.parametrize("backend", [TRITON], indirect=True)
def test_a_row_does_not_depend_on_its_company(backend):
    rows, whiteners = draw(70, 2, 5, dtype=torch.float32)
    codes, _, norms = encode(backend, rows, whiteners, "float16")
    for n in (0, 1, 64, 69):
        alone, _, norm = encode(backend, rows[n : n + 1], whiteners, "float16")
        assert torch.equal(alone[0], codes[n])
        assert torch.equal(norm[0], norms[n])


def test_float16_narrows_once_and_keeps_the_true_norms(backend):
    rows, whiteners = draw(20, 3, 16, dtype=torch.float32)
    wide, _, norms = encode(backend, rows, whiteners, "float32")
    narrow, _, kept = encode(backend, rows, whiteners, torch.float16)
    assert torch.equal(narrow, wide.half())
    assert torch.equal(norms, kept)


def test_float16_refuses_what_it_cannot_hold_but_keeps_infinity_and_nan(backend):
    rows, whiteners = torch.ones(3, 1, 2), torch.eye(2)[None]
    rows[0, 0, 0], rows[1] = torch.inf, torch.nan
    codes, _, norms = encode(backend, rows, whiteners, "float16")
    assert not codes[:2].isfinite().any()
    assert not norms[:2].isfinite().any()
    assert norms[2] == 2
    rows[2, 0, 1] = 7e4
    with pytest.raises(ValueError, match=r"rows\[2\] reaches 7e\+04 in block 0, beyond float16's 65504"):
        encode(backend, rows, whiteners, "float16")


@pytest.mark.parametrize("backend", [TRITON], indirect=True)
def test_the_device_refuses_float64(backend):
    with pytest.raises(TypeError, match="for float64 rows use backend='reference'"):
        encode(backend, *draw(2, 1, 3), "float32")


def test_without_whiteners_rows_stay(backend):
    rows, _ = draw(4, 2, 3, dtype=torch.float32)
    codes, _, norms = encode(backend, rows, None, "float32")
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
