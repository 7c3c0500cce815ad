"""The kernels inside other people's graphs: custom ops that torch.compile, fake tensors and opcheck accept."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trackstar_kernels import encode_rows, mixed_topk, project_gradients, projection_matrix, score_topk

GRADIENT = {
    "padded": (torch.randn(3, 5, 6), torch.randn(3, 5, 4), torch.randn(2, 4), torch.randn(3, 6), None, None),
    "packed, exact": (
        torch.randn(9, 6),
        torch.randn(9, 4),
        torch.randn(2, 4),
        torch.randn(3, 6),
        torch.rand(4, 6),
        torch.tensor([0, 4, 4, 9]),
    ),
    "rank 2, bf16": (
        torch.randn(3, 5, 6).bfloat16(),
        torch.randn(3, 5, 4).bfloat16(),
        torch.randn(2, 2, 4),
        torch.randn(2, 3, 6),
        None,
        None,
    ),
}
OPS = {
    f"project_gradients, {name}": ("project_gradients", (*case, None, True))
    for name, case in GRADIENT.items()
}
OPS |= {
    "score_topk": ("score_topk", (torch.randn(2, 1, 8), torch.randn(7, 1, 8), 3, None, True, 0, None)),
    "mixed_topk": (
        "mixed_topk",
        (
            torch.randn(2, 2, 4),
            torch.randn(7, 2, 4),
            torch.rand(7, 2) + 4,
            3,
            0.5,
            torch.rand(7, 2),
            False,
            5,
            None,
        ),
    ),
    "encode_rows, whitened": (
        "encode_rows",
        (torch.randn(5, 2, 9), torch.randn(2, 9, 9), "int4", None),
    ),
    "encode_rows, as they are": ("encode_rows", (torch.randn(5, 2, 9), None, "float32", None)),
    "projection_matrix": (
        "projection_matrix",
        (3, 5, -1, 7, "countsketch", torch.bfloat16, torch.device("cpu"), None),
    ),
}


@pytest.mark.parametrize(("name", "arguments"), OPS.values(), ids=OPS)
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(torch.ops.trackstar, name), arguments)


def sketches(x, delta, left, right, scale, offsets):
    return 2 * project_gradients(x.sin(), delta, left, right, scale=scale, offsets=offsets)


def best(queries, rows):
    scores, indices = score_topk(queries + 1, rows, 3)
    return scores * 2, indices + 1


def best_mixed(queries, rows):
    return mixed_topk(queries * 2, rows, rows.square().sum(2), 3, 0.9)


def encoded(rows, whiteners):
    codes, scales, squared_norms = encode_rows(rows * 2, whiteners, "sign")
    return codes + 0, scales * 2, squared_norms


def sketch(x):
    return x @ projection_matrix(3, x.shape[1], seed=2**64 - 1, stream=2**63, kind="gaussian").T


FUNCTIONS = {name: (sketches, case) for name, case in GRADIENT.items()}
FUNCTIONS["score_topk"] = (best, (torch.randn(2, 8), torch.randn(7, 8)))
FUNCTIONS["encode_rows"] = (encoded, (torch.randn(5, 2, 9), torch.randn(2, 9, 9)))
FUNCTIONS["projection_matrix"] = (sketch, (torch.randn(2, 8),))
FUNCTIONS["mixed_topk"] = (best_mixed, (torch.randn(2, 2, 4), torch.randn(7, 2, 4)))


@pytest.mark.parametrize(("function", "arguments"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_compiles_into_one_graph(function, arguments):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize(("function", "arguments"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_fake_tensors_have_the_real_shapes(function, arguments):
    real = function(*arguments)
    with FakeTensorMode() as mode:
        fake = function(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    for got, wanted in zip(*((r if isinstance(r, tuple) else (r,)) for r in (fake, real)), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


CALLS = """
import sys, torch, trackstar_kernels as tk
rows, queries = torch.randn(9, 2, 8), torch.randn(2, 2, 8)
codes, scales, squared_norms = tk.encode_rows(rows, torch.randn(2, 8, 8), "int8")
tk.score_topk(queries, codes, 3, scales=scales)
tk.mixed_topk(queries, rows, rows.square().sum(2), 3, 0.5)
tk.project_gradients(rows, rows, tk.projection_matrix(3, 8, seed=0, stream=0), torch.randn(3, 8))
print("torch._dynamo" in sys.modules)
"""


def test_calls_do_not_load_the_compiler():
    """Which takes seconds, in every process that asks a store."""
    finished = subprocess.run([sys.executable, "-c", CALLS], check=True, capture_output=True, text=True)
    assert finished.stdout == "False\n"
