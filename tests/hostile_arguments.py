"""Ops of trackstar_kernels, called with anything: test_hostile_arguments.py runs this in a process of its own.

Of sensible arguments up to two are spoilt. A public op then returns what the reference backend returns for them, or
raises an error that names an argument.
"""

import inspect
import os
import warnings

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import HealthCheck, given, settings

import trackstar_kernels as tk
from trackstar_kernels.scoring import prepare_task

FUZZ = settings(
    max_examples=int(os.environ["HOSTILE_EXAMPLES"]),
    suppress_health_check=[HealthCheck.too_slow],
)
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64),
]
NO_TENSORS = [None, 5, "x", [[1.0]], np.ones((2, 2), np.float32)]
NO_SCALARS = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63 - 1,
    2**70,
    0.5,
    1.0,
    float("nan"),
    "x",
    np.int64(1),
    range(1),
]


def other_shape(tensor, draw):
    how = draw(
        st.sampled_from(["fewer dimensions", "more dimensions", "longer", "shorter", "empty", "mirrored"])
    )
    if tensor.dim() == 0 or how == "more dimensions":
        return tensor[None]
    if how == "fewer dimensions":
        return tensor.flatten(0, min(1, tensor.dim() - 1)) if draw(st.booleans()) else tensor[0]
    axis = draw(st.integers(0, tensor.dim() - 1))
    if how == "longer":
        return torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
    if how == "mirrored":
        return tensor.permute(*reversed(range(tensor.dim())))
    return tensor.narrow(axis, 0, 0 if how == "empty" else tensor.shape[axis] - 1)


def other_memory(tensor, draw):
    """The shape and dtype stay, the strides do not."""
    how = draw(st.sampled_from(["gaps", "backwards", "one number", "overlapping", "offset"]))
    if how == "gaps":
        wide = tensor.new_zeros(*tensor.shape, 2)
        wide[..., 0] = tensor
        return wide[..., 0]
    if how == "backwards":
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(*order).contiguous().permute(*order)
    if how == "one number":
        return tensor.flatten()[:1].expand(tensor.numel()).as_strided(tensor.shape, (0,) * tensor.dim())
    if how == "overlapping":
        return tensor.contiguous().as_strided(tensor.shape, (1,) * tensor.dim())
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


def other_kind(tensor, draw):
    how = draw(st.sampled_from(["sparse", "meta", "negated", "nothing", "nested", "parameter"]))
    if how == "sparse":
        return tensor.to_sparse()
    if how == "meta":
        return tensor.to("meta")
    if how == "nested":
        with warnings.catch_warnings(action="ignore"):  # that its API may change
            return torch.nested.nested_tensor([tensor])
    if how == "nothing":
        return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)
    if not tensor.is_floating_point():
        return tensor
    return torch._neg_view(tensor) if how == "negated" else tensor.clone().requires_grad_()


def other_values(tensor, draw):
    value = draw(st.sampled_from([float("nan"), float("inf"), -3e38, 0.0, 1e-40]))
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return -tensor
    spoilt = tensor.clone()
    spoilt.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = value
    return spoilt


def spoil(value, draw):
    if not isinstance(value, torch.Tensor):
        return draw(st.sampled_from(NO_SCALARS))
    if draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(NO_TENSORS))
    if draw(st.integers(0, 4)) == 0:
        return value.to(draw(st.sampled_from(DTYPES)))
    how = draw(st.sampled_from([other_shape, other_memory, other_kind, other_values]))
    return how(value, draw)


def spoil_some(arguments, draw):
    """The arguments, and which of them are others now."""
    names = draw(st.lists(st.sampled_from(sorted(arguments)), max_size=2, unique=True))
    return arguments | {name: spoil(arguments[name], draw) for name in names}, set(names)


def outcome(call, arguments):
    """What a call returns; None if it raises as it should."""
    try:
        return call(**arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        named = [*inspect.signature(call).parameters, "device", "inputs"]
        assert any(name in str(error) for name in named), error
        return None


def tame(arguments):
    """Whether every number is one that float32 sums in any order alike."""
    return all(
        not value.is_meta and value.isfinite().all() and value.abs().max() < 1e6
        for value in arguments.values()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel()
    )


def assert_same(got, wanted):
    """Equal but for roundings: scores and sketches, and which rows are named where no two scores are near."""
    for ours, theirs in zip(got, wanted, strict=True):
        if theirs is None or ours is None:
            assert ours is theirs
            continue
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        if ours.is_floating_point():
            size = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * size, equal_nan=True)


def check(call, arguments, draw):
    """One call with some arguments spoilt, beside the reference backend's."""
    arguments, _ = spoil_some(arguments, draw)
    got = outcome(call, arguments)
    if got is None or not tame(arguments):
        return
    wanted = call(**arguments | {"backend": "reference"})
    assert_same(*((found,) if isinstance(found, torch.Tensor) else found for found in (got, wanted)))


def sizes(draw, **most):
    return [draw(st.integers(1, size)) for size in most.values()]


def normal(draw, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))


def scoring(draw):
    """Queries, rows in any dtype, their scales and squared norms, and the rows themselves."""
    Q, N, L, d = sizes(draw, Q=7, N=20, L=3, d=40)
    queries, wide = normal(draw, Q, L, d), normal(draw, N, L, d)
    dtype = draw(st.sampled_from(["float32", "float16", "int8", "int4", "sign"]))
    rows, scales, squared_norms = tk.encode_rows(wide, None, dtype)
    if rows.is_floating_point():
        squared_norms = rows.float().square().sum(2)
    return queries, rows, scales, squared_norms, wide, draw(st.integers(1, N))


def options(draw):
    return {"largest": draw(st.booleans()), "start": draw(st.integers(0, 9)), "backend": None}


@FUZZ
@given(data=st.data())
def test_project_gradients(data):
    draw = data.draw
    B, T, I, O, p, q, r = sizes(draw, B=3, T=9, I=20, O=20, p=5, q=5, r=2)
    x, delta = normal(draw, B, T, I), normal(draw, B, T, O)
    offsets = None
    if draw(st.booleans()):
        x, delta = x.flatten(0, 1), delta.flatten(0, 1)
        offsets = torch.arange(B + 1) * T
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    arguments = {
        "activations": x.to(dtype),
        "output_grads": delta.to(dtype),
        "left": normal(draw, r, q, O),
        "right": normal(draw, r, p, I),
        "scale": draw(st.sampled_from([None, normal(draw, O, I).abs()])),
        "offsets": offsets,
        "backend": None,
        "check_finite": draw(st.booleans()),
    }
    check(tk.project_gradients, arguments, draw)


@FUZZ
@given(data=st.data())
def test_encode_rows(data):
    draw = data.draw
    N, L, d = sizes(draw, N=9, L=3, d=40)
    dtype = draw(st.sampled_from(["float32", "float16", "int8", "int4", "sign"]))
    arguments = {"rows": normal(draw, N, L, d), "whiteners": None, "dtype": dtype, "backend": None}
    if draw(st.booleans()):
        arguments["whiteners"] = normal(draw, L, d, d)
    arguments, _ = spoil_some(arguments, draw)
    got = outcome(tk.encode_rows, arguments)
    if got is None or not tame(arguments):
        return
    codes, scales, _ = got
    wanted, wanted_scales, _ = tk.encode_rows(**arguments | {"backend": "reference"})
    size = arguments["rows"].shape[2]
    assert_same(
        [tk.decode_rows(codes, scales, size).norm(dim=2)],
        [tk.decode_rows(wanted, wanted_scales, size).norm(dim=2)],
    )


@FUZZ
@given(data=st.data())
def test_decode_rows(data):
    _, rows, scales, _, wide, _ = scoring(data.draw)
    arguments = {"codes": rows, "scales": scales, "size": wide.shape[2], "dtype": torch.float32}
    arguments, _ = spoil_some(arguments, data.draw)
    if (got := outcome(tk.decode_rows, arguments)) is not None:
        assert got.shape == (*arguments["codes"].shape[:2], arguments["size"])


@FUZZ
@given(data=st.data())
def test_projection_matrix(data):
    draw = data.draw
    arguments = {
        "rows": draw(st.integers(1, 9)),
        "cols": draw(st.integers(1, 99)),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "stream": draw(st.integers(0, 2**64 - 1)),
        "kind": draw(st.sampled_from(["rademacher", "gaussian", "countsketch"])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "device": draw(st.sampled_from(["cpu", "cuda", "cuda:99", "meta", "mps", "nowhere"])),
        "backend": draw(st.sampled_from([None, "numba", "reference", "triton", "nothing"])),
    }
    name = draw(st.sampled_from(sorted(arguments)))
    if draw(st.booleans()):
        # A million million rows are as good as any, if there is the memory.
        few = [value for value in NO_SCALARS if not isinstance(value, int) or value < 2**31 or value > 2**63]
        arguments[name] = draw(st.sampled_from(few))
    if (got := outcome(tk.projection_matrix, arguments)) is not None and not got.is_meta:
        assert torch.equal(got, tk.projection_matrix(**arguments | {"backend": "reference"}))


@FUZZ
@given(data=st.data())
def test_score_topk(data):
    queries, rows, scales, _, _, k = scoring(data.draw)
    arguments = {"queries": queries, "rows": rows, "k": k, "scales": scales, **options(data.draw)}
    check(tk.score_topk, arguments, data.draw)


@FUZZ
@given(data=st.data())
def test_mixed_topk(data):
    draw = data.draw
    queries, rows, scales, squared_norms, _, k = scoring(draw)
    mixing = draw(st.sampled_from([0, 0.5, 0.9]))
    arguments = {"queries": queries, "rows": rows, "squared_norms": squared_norms, "k": k, "mixing": mixing}
    arguments |= {"scales": scales, **options(draw)}
    arguments, spoilt = spoil_some(arguments, draw)
    got = outcome(tk.mixed_topk, arguments)
    # Scores follow the squared norms that they are given; those of other rows are wrong, not an error.
    if got is None or spoilt & {"rows", "squared_norms", "scales", "mixing"} or not tame(arguments):
        return
    assert_same(got, tk.mixed_topk(**arguments | {"backend": "reference"}))


def narrow(draw):
    queries, _, _, _, wide, k = scoring(draw)
    codes, scales, norms = tk.encode_rows(wide, None, draw(st.sampled_from(["int8", "int4", "sign"])))
    return {"queries": queries, "codes": codes, "squared_norms": norms, "scales": scales}, wide, k


@FUZZ
@given(data=st.data())
def test_rescored_topk(data):
    draw = data.draw
    arguments, wide, k = narrow(draw)
    call, arguments = tk.rescored_topk, arguments | {"wider": wide, "k": k, **options(draw)}
    if draw(st.booleans()):
        call, arguments["mixing"] = tk.rescored_mixed_topk, draw(st.sampled_from([0, 0.5, 0.9]))
    arguments, spoilt = spoil_some(arguments, draw)
    got = outcome(call, arguments)
    # The codes must be those of the wider rows.
    if got is None or spoilt - {"queries", "k", "start", "largest", "backend"} or not tame(arguments):
        return
    assert_same(got[:2], call(**arguments | {"backend": "reference"})[:2])


@FUZZ
@given(data=st.data())
def test_score_bounds(data):
    draw = data.draw
    arguments, wide, k = narrow(draw)
    indices = torch.randint(len(wide), (len(arguments["queries"]), k))
    start = draw(st.integers(0, 9))
    mixing = draw(st.sampled_from([None, 0, 0.5]))
    arguments |= {"indices": indices + start, "mixing": mixing, "start": start}
    arguments, _ = spoil_some(arguments, draw)
    if (got := outcome(tk.score_bounds, arguments)) is not None:
        assert got.shape == arguments["indices"].shape


@FUZZ
@given(data=st.data())
def test_tasks(data):
    draw = data.draw
    queries, rows, scales, squared_norms, wide, k = scoring(draw)
    count = draw(st.integers(1, len(queries)))
    arguments = {"queries": queries, "mixing": draw(st.sampled_from([0, 0.5, 0.9])), "backend": None}
    arguments, _ = spoil_some(arguments | {"asked": range(count), "task": None}, draw)
    task = outcome(prepare_task, arguments)
    if task is None:
        return
    name = draw(st.sampled_from(["topk", "extremes", "rescored_topk", "rescored", "score_bounds"]))
    if name in ("topk", "extremes"):
        arguments = {"rows": rows, "k": k}
    else:
        codes, scales, squared_norms = tk.encode_rows(wide, None, "int8")
        arguments = {"codes": codes} if name == "score_bounds" else {"codes": codes, "wider": wide, "k": k}
    arguments |= {"squared_norms": squared_norms, "scales": scales}
    if name == "rescored":
        arguments |= {"ends": (True, False), "places": torch.arange(len(wide)).flip(0)}
        arguments["reached"] = draw(st.sampled_from([None, [torch.zeros(count), None]]))
    arguments, _ = spoil_some(arguments, draw)
    outcome(getattr(task, name), arguments)
