"""project_gradients against its definition, and the promises of its docstring."""

import itertools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_device import DEVICE, HAS_CUDA, TRITON, triton_runs

from trackstar_kernels import _C, available_backends, gradient, project_gradients
from trackstar_kernels._architecture import ARCHITECTURES

# The cpu backend once for each instruction set level that this machine can run.
KERNELS = [f"cpu {isa}" for isa in _C.available_isas()]


@pytest.fixture(params=["reference", *KERNELS, TRITON])
def backend(request):
    yield from level_in_force(request.param)


@pytest.fixture(params=KERNELS)
def kernel(request):
    yield from level_in_force(request.param)


def level_in_force(name):
    """Yield the backend's own name, with its level in force meanwhile."""
    if name == "triton":
        with triton_runs(gradient.BACKENDS):
            yield name
        return
    backend, *level = name.split()
    before = _C.isa()
    _C.set_isa(*level or [before])
    yield backend
    _C.set_isa(before)


@dataclass
class Case:
    """One call: packed examples of the given lengths, and everything else."""

    lengths: list[int]
    sizes: tuple[int, int, int, int]  # I, O, p, q
    rank: int | None = None
    exact: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0
    countsketch: str = ""  # "left", "right" or "left, right": one non-zero number a column

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        tokens = sum(self.lengths)
        in_features, out_features, p, q = self.sizes
        ranks = () if self.rank is None else (self.rank,)
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.activations = normal(tokens, in_features).to(self.dtype)
        self.output_grads = normal(tokens, out_features).to(self.dtype)
        self.left = normal(*ranks, q, out_features) / q**0.5
        self.right = normal(*ranks, p, in_features) / p**0.5
        for side in filter(None, self.countsketch.split(", ")):
            sketch = getattr(self, side)
            row = torch.randint(sketch.shape[-2], sketch[..., :1, :].shape, generator=generator)
            setattr(self, side, torch.zeros_like(sketch).scatter(-2, row, sketch.gather(-2, row)))
        self.scale = normal(out_features, in_features).exp() if self.exact else None
        self.offsets = torch.tensor([0, *itertools.accumulate(self.lengths)])

    def run(self, backend, **replaced):
        """The packed call, with some of its arguments replaced."""
        arguments = {"activations": self.activations, "output_grads": self.output_grads}
        arguments |= {"left": self.left, "right": self.right, "scale": self.scale, "offsets": self.offsets}
        device = DEVICE if backend == "triton" else "cpu"
        there = {
            n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in (arguments | replaced).items()
        }
        return project_gradients(**there, backend=backend).cpu()

    def example(self, b):
        """Example b's activations and output gradients, as a batch of one."""
        tokens = slice(self.offsets[b], self.offsets[b + 1])
        return {
            "activations": self.activations[tokens][None],
            "output_grads": self.output_grads[tokens][None],
        }

    def padded(self, extra=0):
        """All examples, padded with zeros to the longest length and `extra` more."""
        longest = max(self.lengths, default=0) + extra
        return {
            name: torch.stack(
                [
                    torch.nn.functional.pad(self.example(b)[name][0], (0, 0, 0, longest - length))
                    for b, length in enumerate(self.lengths)
                ]
            )
            for name in ("activations", "output_grads")
        }

    def truth(self):
        """The definition in float64, with explicit sums."""
        left, right = (t.double().reshape(-1, *t.shape[-2:]) for t in (self.left, self.right))
        rows = []
        for b in range(len(self.lengths)):
            x, delta = (t[0].double() for t in self.example(b).values())
            gradient = torch.einsum("to,ti->oi", delta, x)
            if self.scale is not None:
                gradient = gradient * self.scale.double()
            rows.append(torch.einsum("rqo,oi,rpi->qp", left, gradient, right))
        return torch.stack(rows)


def assert_accurate(case, got, backend_of_rule="reference"):
    """Error at most twice that of the definition evaluated in the same precision."""
    truth, plain = case.truth(), case.run(backend_of_rule)
    assert got.dtype == torch.float32
    assert got.shape == truth.shape
    error, allowed = (got.double() - truth).abs().max(), 2 * (plain.double() - truth).abs().max()
    assert error <= allowed + 1e-6 * truth.abs().max()


# On both sides of every boundary: tiles of 6 to 24, blocks of 96 and 192, chains of 256, pieces of 1024.
SHAPES = [
    ([16, 16], (64, 96, 16, 16)),
    ([1], (1, 1, 1, 1)),
    ([5, 1, 3], (7, 5, 3, 2)),
    ([257, 0, 31], (193, 49, 17, 7)),
    ([1025, 2, 1024, 3], (31, 53, 5, 8)),
    ([2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2], (389, 307, 16, 16)),
    ([40], (100, 100, 130, 129)),
]
# For the interpreter, which takes a millisecond for an operation: a few tiles of each kernel, none of them full.
TINY = [
    ([1], (1, 1, 1, 1)),
    ([5, 0, 3], (7, 5, 3, 2)),
    ([67, 0, 31], (131, 137, 5, 7)),
    ([1027, 2], (31, 13, 5, 17)),
    ([40], (33, 65, 67, 66)),
]
FORMS = {
    "plain": {},
    "rank 3": {"rank": 3},
    "exact": {"exact": True},
    "exact, rank 2": {"rank": 2, "exact": True},
    "plain, CountSketch": {"countsketch": "left"},
    "rank 3, CountSketches": {"rank": 3, "countsketch": "left, right"},
    "exact, CountSketch": {"exact": True, "countsketch": "left"},
    "exact, rank 2, CountSketches": {"rank": 2, "exact": True, "countsketch": "left, right"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("kernel", "lengths", "sizes"),
    [
        *(pytest.param(kernel, *shape) for kernel in KERNELS for shape in SHAPES),
        *(pytest.param(*TRITON.values, *shape, marks=TRITON.marks) for shape in TINY),
    ],
    indirect=["kernel"],
)
def test_matches_definition(kernel, lengths, sizes, form):
    case = Case(lengths, sizes, **form)
    assert_accurate(case, case.run(kernel))
    assert_accurate(case, case.run(kernel, offsets=None, **case.padded()))


@pytest.mark.skipif(HAS_CUDA, reason="a device runs its own configurations alone")
@pytest.mark.parametrize("sizes", [(70, 67, 5, 7), (35, 66, 17, 3)], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_configurations_of_every_architecture(arch, dtype, sizes):
    case = Case([35, 2], sizes, exact=True, dtype=dtype)
    with triton_runs(gradient.BACKENDS, arch=arch):
        assert_accurate(case, case.run("triton"))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_reference_keeps_float64(form):
    case = Case([30, 0, 7], (13, 11, 5, 3), **form, dtype=torch.float64)
    got = case.run("reference")
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, case.truth(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("countsketch", ["", "left"])
def test_narrow_inputs_are_widened_first(backend, dtype, exact, countsketch):
    case = Case([50, 21], (70, 61, 8, 8), exact=exact, dtype=dtype, countsketch=countsketch)
    assert_accurate(case, case.run(backend))
    narrow = {"left": case.left.to(dtype), "right": case.right.to(dtype)}
    wide = {name: tensor.float() for name, tensor in narrow.items()}
    assert torch.equal(case.run(backend, **narrow), case.run(backend, **wide))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_changes_nothing(kernel, dtype, form):
    if _C.isa() in ("avx512-bf16", "amx") and dtype == torch.bfloat16:
        pytest.skip("pairs of bfloat16 are added in another order")
    case = Case([50, 21, 300], (70, 61, 8, 8), **form, dtype=dtype)
    wide = {"activations": case.activations.float(), "output_grads": case.output_grads.float()}
    assert torch.equal(case.run(kernel), case.run(kernel, **wide))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=10),
    sizes=st.tuples(*[st.integers(1, 211)] * 2, *[st.integers(1, 37)] * 2),
    rank=st.sampled_from([None, 1, 2]),
    exact=st.booleans(),
    countsketch=st.sampled_from(["", "left", "right", "left, right"]),
    level=st.sampled_from(KERNELS),
)
def test_any_shape(lengths, sizes, rank, exact, countsketch, level):
    case = Case(lengths, sizes, rank=rank, exact=exact, countsketch=countsketch)
    for backend in level_in_force(level):
        assert_accurate(case, case.run(backend))


def assert_rows_depend_on_themselves(case, backend, extra):
    """Bit for bit: packed, padded, alone or in another batch."""
    packed = case.run(backend)
    assert torch.equal(case.run(backend, offsets=None, **case.padded()), packed)
    assert torch.equal(case.run(backend, offsets=None, **case.padded(extra)), packed)
    for b, row in enumerate(packed):
        assert torch.equal(case.run(backend, offsets=None, **case.example(b))[0], row)
    tail = case.offsets[3]
    later = {
        "activations": case.activations[tail:],
        "output_grads": case.output_grads[tail:],
        "offsets": (case.offsets[3:] - tail).to(torch.int32),
    }
    assert torch.equal(case.run(backend, **later), packed[3:])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("threads", [1, 3])
def test_row_does_not_depend_on_its_company(kernel, form, threads):
    case = Case([3, 260, 1, 16, 0, 2, 17, 5, 1100, 1], (200, 100, 16, 9), **form)
    before = torch.get_num_threads()
    single = case.run(kernel)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(case.run(kernel), single)
        assert_rows_depend_on_themselves(case, kernel, extra=1000)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", [TRITON], indirect=True)
@pytest.mark.parametrize(
    ("form", "dtype"),
    list(zip(FORMS.values(), [torch.float32, torch.bfloat16] * 4, strict=True)),
    ids=FORMS,
)
def test_row_does_not_depend_on_its_company_on_a_gpu(backend, form, dtype):
    case = Case([3, 70, 0, 17], (140, 33, 16, 9), **form, dtype=dtype)
    assert_rows_depend_on_themselves(case, backend, extra=70)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kernel", [*KERNELS, TRITON], indirect=True)
def test_reads_nothing_beyond_its_inputs(kernel, exact):
    """Every input lies between NaNs."""

    def fenced(tensor):
        fence = torch.full((tensor.numel() + 2048,), torch.nan)
        fence[1024:-1024] = tensor.flatten()
        return fence[1024:-1024].view(tensor.shape)

    case = Case([5, 7, 19], (35, 23, 5, 7), rank=2, exact=exact)
    names = ("activations", "output_grads", "left", "right", *(["scale"] if exact else []))
    got = case.run(kernel, **{name: fenced(getattr(case, name)) for name in names})
    assert torch.equal(got, case.run(kernel))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_stays_in_its_row(backend, exact, poison):
    case = Case([6, 6, 6], (35, 23, 5, 7), exact=exact)
    clean = case.run(backend)
    case.output_grads[8, 3] = poison
    got = case.run(backend, check_finite=False)
    assert not got[1].isfinite().any()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("exact", [False, True])
def test_nan_reaches_its_bucket(kernel, exact):
    case = Case([6, 6, 6], (35, 23, 5, 7), exact=exact, countsketch="left")
    case.left[:, 11] = 0
    assert_accurate(case, case.run(kernel))
    clean = case.run(kernel)
    case.output_grads[8, 3] = torch.nan
    got = case.run(kernel, check_finite=False)
    assert got[1, case.left[:, 3] != 0].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "sizes", "rank"),
    [
        (0, 4, (3, 2, 5, 6), None),
        (2, 0, (3, 2, 5, 6), None),
        (2, 4, (0, 2, 5, 6), None),
        (2, 4, (3, 0, 5, 6), None),
        (2, 4, (3, 2, 5, 6), 0),
        (2, 4, (3, 2, 0, 6), 1),
        (2, 4, (3, 2, 5, 0), 1),
    ],
)
def test_empty_sums_are_zero(backend, exact, batch, tokens, sizes, rank):
    case = Case([tokens] * batch, sizes, rank=rank, exact=exact)
    assert torch.equal(case.run(backend), torch.zeros(batch, sizes[3], sizes[2]))
    in_features, out_features, *_ = sizes
    padded = {
        "activations": torch.ones(batch, tokens, in_features),
        "output_grads": torch.ones(batch, tokens, out_features),
    }
    assert torch.equal(case.run(backend, offsets=None, **padded), torch.zeros(batch, sizes[3], sizes[2]))


@pytest.mark.parametrize("exact", [False, True])
def test_strides_and_autograd_do_not_matter(backend, exact):
    case = Case([6, 5], (35, 23, 5, 7), exact=exact)
    odd = {
        "activations": case.activations.T.contiguous().T.requires_grad_(),
        "output_grads": case.output_grads.repeat_interleave(2, 0)[::2],
        "left": case.left.T.contiguous().T.requires_grad_(),
        "offsets": case.offsets.repeat_interleave(2)[::2],
    }
    got = case.run(backend, **odd)
    assert not got.requires_grad
    torch.testing.assert_close(got, case.run(backend))


def test_is_the_gradient_that_autograd_computes(backend):
    """One backward pass an example, then the projection of the whole weight's gradient."""
    case = Case([9, 9, 9], (24, 16, 5, 7), exact=True)
    layer = torch.nn.Linear(24, 16)
    batch = torch.randn(3, 9, 24)
    expected = []
    for example in batch:
        layer.zero_grad()
        layer(example).tanh().sum().backward()
        expected.append(case.left @ (layer.weight.grad * case.scale) @ case.right.T)
    outputs = layer(batch)
    (output_grads,) = torch.autograd.grad(outputs.tanh().sum(), outputs)
    got = case.run(backend, activations=batch, output_grads=output_grads, offsets=None)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"activations": [1.0]}, TypeError, "activations must be a torch.Tensor, got list"),
        ({"scale": 2.0}, TypeError, "scale must be a torch.Tensor, got float"),
        (
            {"activations": torch.ones(6, 4).int()},
            TypeError,
            "activations must have dtype float32.*got int32",
        ),
        (
            {"output_grads": torch.ones(6, 3).half()},
            TypeError,
            "output_grads must have dtype float32; got float16",
        ),
        ({"left": torch.ones(2, 3).half()}, TypeError, "left must have dtype float32; got float16"),
        ({"scale": torch.ones(3, 4).double()}, TypeError, "scale must have dtype float32; got float64"),
        (
            {"activations": torch.ones(2, 3, 4)},
            ValueError,
            r"activations must have shape \(ΣT, I\), got \(2, 3, 4\)",
        ),
        ({"offsets": None}, ValueError, r"activations must have shape \(B, T, I\), got \(6, 4\)"),
        (
            {"output_grads": torch.ones(5, 3)},
            ValueError,
            r"output_grads must have shape \(6, O\), got \(5, 3\)",
        ),
        ({"output_grads": torch.tensor(1.0)}, ValueError, r"output_grads must have shape \(6, O\), got \(\)"),
        (
            {"left": torch.ones(2, 4)},
            ValueError,
            r"left must have shape \(q, 3\) or \(r, q, 3\), got \(2, 4\)",
        ),
        ({"right": torch.ones(2, 3)}, ValueError, r"right must have shape \(p, 4\), got \(2, 3\)"),
        ({"right": torch.ones(1, 2, 4)}, ValueError, r"right must have shape \(p, 4\), got \(1, 2, 4\)"),
        (
            {"left": torch.ones(2, 2, 3), "right": torch.ones(3, 2, 4)},
            ValueError,
            r"right must have shape \(2, p, 4\), got \(3, 2, 4\)",
        ),
        ({"scale": torch.ones(4, 3)}, ValueError, r"scale must have shape \(3, 4\), got \(4, 3\)"),
        ({"left": torch.ones(2, 3, device="meta")}, ValueError, "one device, got .*left on meta"),
        (
            {"offsets": torch.tensor([0.0, 6.0])},
            TypeError,
            "offsets must have dtype int32, int64; got float32",
        ),
        (
            {"offsets": torch.tensor([[0, 6]])},
            ValueError,
            r"offsets must have shape \(B \+ 1,\), got \(1, 2\)",
        ),
        (
            {"offsets": torch.tensor([], dtype=torch.int64)},
            ValueError,
            "offsets must have at least one element",
        ),
        (
            {"offsets": torch.tensor([1, 6])},
            ValueError,
            "offsets must run from 0 to the 6 tokens .* got 1 to 6",
        ),
        (
            {"offsets": torch.tensor([0, 5])},
            ValueError,
            "offsets must run from 0 to the 6 tokens .* got 0 to 5",
        ),
        (
            {"offsets": torch.tensor([0, 4, 2, 6])},
            ValueError,
            "offsets must ascend, got 4 before 2 at position 2",
        ),
        (
            {"activations": torch.tensor([[1.0] * 4] * 5 + [[1.0, 1.0, torch.nan, 1.0]])},
            ValueError,
            r"activations must be finite, got nan at \[5, 2\]",
        ),
        (
            {"output_grads": torch.full((6, 3), -torch.inf)},
            ValueError,
            r"output_grads must be finite, got -inf at \[0, 0\]",
        ),
        (
            {"scale": torch.tensor([[1.0] * 4, [torch.inf] * 4, [1.0] * 4])},
            ValueError,
            r"scale must be finite, got inf at \[1, 0\]: a second moment is zero",
        ),
        (
            {"right": torch.full((2, 4), torch.nan)},
            ValueError,
            r"right must be finite, got nan at \[0, 0\]",
        ),
        (
            {"activations": torch.full((6, 4), 3e38)},
            ValueError,
            "exceeds the largest float32",
        ),
        (
            {"backend": "triton"},
            ValueError,
            "backend of project_gradients on cpu must be one of cpu, reference",
        ),
    ],
)
def test_bad_input(replaced, error, message):
    arguments = {
        "activations": torch.ones(6, 4),
        "output_grads": torch.ones(6, 3),
        "left": torch.ones(2, 3),
        "right": torch.ones(2, 4),
        "offsets": torch.tensor([0, 6]),
    }
    with pytest.raises(error, match=message):
        project_gradients(**arguments | replaced)


PEAK = """
import sys
import torch
from trackstar_kernels import project_gradients, projection_matrix

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

kind, batch, features = sys.argv[1], int(sys.argv[2]), 1024
torch.set_num_threads(1)
x, delta = torch.ones(2, batch, 64, features)
left = projection_matrix(16, features, seed=0, stream=0, kind=kind)
right, scale = torch.ones(16, features), torch.ones(features, features)
project_gradients(x[:1, :1], delta[:1, :1], left, right, scale=scale)  # load everything once
before = peak()
project_gradients(x, delta, left, right, scale=scale)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak memory of a process")
@pytest.mark.parametrize("kind", ["rademacher", "countsketch"])
def test_memory_does_not_grow_with_the_batch(kind):
    few, many = (
        int(subprocess.check_output([sys.executable, "-c", PEAK, kind, str(batch)])) for batch in (8, 64)
    )
    gradient = 1024 * 1024 * 4
    assert few < 8 * gradient
    assert many - few < gradient


@pytest.mark.parametrize("kernel", [*KERNELS, TRITON], indirect=True)
def test_kernels_refuse_float64(kernel):
    case = Case([4], (3, 2, 5, 6), dtype=torch.float64)
    with pytest.raises(TypeError, match="for float64 activations use backend='reference'"):
        case.run(kernel)


def test_backends():
    assert available_backends()["project_gradients"]["cpu"] == ("cpu", "reference")
