import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import on_backend
from triton_device import DEVICE, TRITON, triton_runs

from trackstar_kernels import _C, decode_rows, encode_rows
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
    return codes.cpu(), None if scales is None else scales.cpu(), squared_norms.cpu()


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


# ---- int8, int4, sign ---------------------------------------------------------------------------------------

NARROW = {"int8": (torch.int8, 1), "int4": (torch.uint8, 2), "sign": (torch.int32, 32)}
LEVELS = [
    [-127, -92, -71, -55, -42, -30, -19, -8, 2, 13, 24, 36, 48, 62, 80, 108],
    [-108, -80, -62, -48, -36, -24, -13, -2, 8, 19, 30, 42, 55, 71, 92, 127],
]
narrow = pytest.mark.parametrize("dtype", NARROW)


def unpacked(codes, size, dtype):
    """The numbers of a block's codes, taken from their bits one by one."""
    numbers = []
    for i in range(size):
        if dtype == "int8":
            numbers.append(int(codes[i]))
        elif dtype == "int4":
            first = 33 * (i // 64)
            multiplier = 1 + (int(codes[first]) >> 4 * (i % 64 // 32) & 15)
            code, last, other = (
                int(codes[first + 1 + place // 2]) >> 4 * (place % 2) & 15
                if place >= i % 64 // 32 * 32
                else 0
                for place in (i % 64, i % 64 - 1, i % 64 - 2)
            )
            numbers.append((LEVELS[last % 2][code ^ other % 2] * multiplier + 8) // 16)
        else:
            numbers.append(-1 if int(codes[i // 32]) >> (i % 32) & 1 else 1)
    return numbers


@narrow
@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 64, 65, 96, 97, 257])
def test_codes_are_laid_out_as_documented(backend, dtype, size):
    rows, _ = draw(3, 2, size, dtype=torch.float32)
    codes, scales, norms = encode(backend, rows, None, dtype)
    code_dtype, elements = NARROW[dtype]
    assert codes.dtype == code_dtype and codes.shape[:2] == (3, 2)
    assert codes.shape[2] == -(-size // elements) + (-(-size // 64) if dtype == "int4" else 0)
    assert scales.dtype == norms.dtype == torch.float32 and scales.shape == norms.shape == (3, 2)
    numbers = torch.tensor([[unpacked(block, size, dtype) for block in row] for row in codes])
    assert torch.equal(decode_rows(codes, scales, size), numbers.float() * scales[:, :, None])
    assert torch.equal(decode_rows(codes, scales, size, torch.float64), numbers * scales.double()[:, :, None])
    # Signs are kept wherever something is, but for small numbers of int4.
    assert (numbers * rows >= (-0.1 if dtype == "int4" else 0) * rows.abs().amax()).all()
    # Whatever a block leaves of its last byte or word is zero.
    left = -size % elements
    if left:
        used = elements - left
        bits = codes[..., -1].long() & (2 ** (8 * codes.itemsize) - 1)
        assert (bits >> used * 8 * codes.itemsize // elements == 0).all()
    if dtype == "int4" and 0 < size % 64 <= 32:
        assert (codes[..., size // 64 * 33] < 16).all()


@narrow
@pytest.mark.parametrize("spread", [0, 3])
def test_codes_are_the_best_in_their_direction(dtype, spread):
    """‖y − ŷ‖² = ‖y‖² − ‖ŷ‖², which the bounds of scoring rest on."""
    rows, _ = draw(40, 3, 256, dtype=torch.float32)
    rows = (rows * (spread * draw(40, 3, 256, seed=1)[0]).exp()).float()
    codes, scales, norms = encode_rows(rows, None, dtype)
    decoded = decode_rows(codes, scales, 256, torch.float64)
    lost = (rows - decoded).square().sum(2)
    squares = rows.double().square().sum(2)
    assert ((lost - (norms - decoded.square().sum(2))).abs() <= 2**-21 * squares).all()
    if spread == 0:  # of normal numbers sign must lose 1 − 2/π = 0.363, and the levels of int4 0.0049
        assert lost.sum() / squares.sum() <= {"int8": 5.5e-5, "int4": 0.0050, "sign": 0.38}[dtype]


def test_no_codes_of_int4_lose_less(backend):
    """Of all that four numbers could have, with the multiplier that they have."""
    rows, _ = draw(30, 1, 4, dtype=torch.float32)
    packed, _, _ = encode(backend, rows, None, "int4")
    multipliers = packed[:, 0, 0].double() + 1
    found = torch.stack([packed[:, 0, 1 + i // 2] >> 4 * (i % 2) & 15 for i in range(4)], dim=1).long()
    wanted = rows[:, 0].double() / rows.abs().amax(2) * 127 * 16 / multipliers[:, None]
    every = torch.cartesian_prod(*[torch.arange(16)] * 4)
    levels = torch.tensor(LEVELS)

    def stands_for(codes):
        last, other = (torch.nn.functional.pad(codes, (n, 0))[:, : codes.shape[1]] % 2 for n in (1, 2))
        return levels[last, codes ^ other].double()

    lost = (stands_for(found) - wanted).square().sum(1)
    least = (stands_for(every) - wanted[:, None]).square().sum(2).amin(1)
    torch.testing.assert_close(lost, least)


@given(
    isa=st.sampled_from(_C.available_isas()),
    seed=st.integers(0, 2**31),
    n=st.integers(0, 40),
    size=st.sampled_from([1, 31, 32, 33, 64, 97, 257, 3000]),
)
def test_int4_has_the_same_codes_on_every_backend(isa, seed, n, size):
    rows, _ = draw(n, 2, size, seed=seed, dtype=torch.float32)
    rows[:, 0] *= draw(n, 1, size, seed=seed + 1)[0][:, 0].float().exp()
    wanted = encode_rows(rows, None, "int4", backend="reference")
    with on_backend(f"cpu:{isa}") as backend:
        found = encode_rows(rows, None, "int4", backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_signs_are_scaled_by_the_mean_magnitude():
    rows, _ = draw(5, 2, 77, dtype=torch.float32)
    torch.testing.assert_close(encode_rows(rows, None, "sign")[1], rows.abs().mean(2))


def test_int8_uses_its_range():
    rows, _ = draw(9, 2, 64, dtype=torch.float32)
    assert (encode_rows(rows, None, "int8")[0].abs().amax(2) == 127).all()


@narrow
@pytest.mark.parametrize("factor", [1e-44, 1e-30, 1e30])
def test_very_small_and_very_large_rows(dtype, factor):
    rows, _ = draw(6, 2, 40, dtype=torch.float32)
    rows = rows / rows.abs().amax()
    codes, _, _ = encode_rows(rows, None, dtype)
    tiny = (factor * rows.double()).float()
    other, scales, _ = encode_rows(tiny, None, dtype)
    assert scales.isfinite().all()
    if factor > 1e-40:  # subnormal rows are coarse themselves
        assert torch.equal(other, codes)
    assert ((decode_rows(other, scales, 40).double() * tiny.double()).sum(2) >= 0).all()


@narrow
def test_zeros_and_what_is_not_finite(backend, dtype):
    rows, _ = draw(4, 2, 33, dtype=torch.float32)
    rows[0] = 0
    rows[1, 0, 3], rows[2, 1, 5] = torch.nan, -torch.inf
    codes, scales, norms = encode(backend, rows, None, dtype)
    assert not scales[0].any() and not codes[0].any() and not norms[0].any()
    broken = torch.zeros(4, 2, dtype=torch.bool)
    broken[1, 0] = broken[2, 1] = True
    assert torch.equal(scales.isnan(), broken)
    assert torch.equal(~norms.isfinite(), broken)
    assert torch.equal(decode_rows(codes, scales, 33).isnan(), broken[:, :, None].expand(4, 2, 33))


@narrow
def test_narrow_rows_do_not_depend_on_their_company(dtype, monkeypatch):
    rows, _ = draw(50, 3, 17, dtype=torch.float32)
    whole = encode_rows(rows, None, dtype)
    for start, stop in [(0, 1), (3, 20), (49, 50)]:
        part = encode_rows(rows[start:stop], None, dtype)
        assert all(torch.equal(a, b[start:stop]) for a, b in zip(part, whole, strict=True))
    monkeypatch.setattr("trackstar_kernels.encode._narrow.CHUNK", 200)
    assert all(torch.equal(a, b) for a, b in zip(encode_rows(rows, None, dtype), whole, strict=True))


@narrow
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [33, 64])
def test_narrow_codes_of_rows_that_are_not_contiguous(backend, dtype, rows_dtype, size):
    if backend == "triton" and rows_dtype == torch.float64:
        pytest.skip("computes in float32")
    rows, _ = draw(5, 3, size, dtype=rows_dtype)
    apart = rows.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not apart.is_contiguous()
    for found, wanted in zip(
        encode(backend, apart, None, dtype), encode(backend, rows, None, dtype), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@narrow
def test_narrow_codes_are_those_of_the_whitened_rows(backend, dtype):
    rows, whiteners = draw(9, 2, 16, dtype=torch.float32)
    whitened, _, norms = encode(backend, rows, whiteners, "float32")
    codes, scales, kept = encode(backend, rows, whiteners, dtype)
    wanted, wanted_scales, _ = encode_rows(whitened, None, dtype)
    assert torch.equal(codes, wanted) and torch.equal(scales, wanted_scales) and torch.equal(kept, norms)


@narrow
def test_empty(dtype):
    codes, scales, norms = encode_rows(torch.empty(0, 3, 40), None, dtype)
    assert len(codes) == 0 and scales.shape == norms.shape == (0, 3)


# ---- Errors -------------------------------------------------------------------------------------------------


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
        (
            torch.ones(2, 3, 4),
            None,
            "int3",
            ValueError,
            "dtype must be one of float32, float16, int8, int4, sign; got 'int3'",
        ),
        (torch.full((1, 1, 1), 1e6), None, "float16", ValueError, r"rows\[0\] reaches 1e\+06 in block 0"),
        ([[1.0]], None, "float32", TypeError, "rows must be a torch.Tensor, got list"),
    ],
)
def test_bad_input(rows, whiteners, dtype, error, message):
    with pytest.raises(error, match=message):
        encode_rows(rows, whiteners, dtype)
