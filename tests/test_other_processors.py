"""The C++ kernels for processors that this machine is not: cross-compiled and emulated, or with a stand-in."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_gradient import FORMS, SHAPES, Case, assert_accurate

from trackstar_kernels import decode_rows, encode_rows
from trackstar_kernels._codes import code_size
from trackstar_kernels.encode._trellis import pack_best_codes

ROOT = Path(__file__).parent.parent
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ELEMENTS = [torch.float32, torch.bfloat16, torch.float16]

ROW_TYPES = ["float32", "float16", "bfloat16", "int8", "int4", "sign"]

pytestmark = pytest.mark.slow


class Driver:
    """tests/kernel_driver.cpp and the kernels, built by a compiler and run through an emulator."""

    def __init__(self, folder, compiler, options, emulator=()):
        self.folder, self.emulator = folder, emulator
        sources = [ROOT / "tests" / "kernel_driver.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
        options = ["-std=gnu++17", "-O3", "-w", "-DTRACKSTAR_ISA=baseline", f"-I{ROOT / 'csrc'}", *options]
        subprocess.run([compiler, *options, *sources, "-o", folder / "driver"], check=True)

    def run(self, *arguments, results):
        """Arguments are words, numbers, tensors or None; results the tensors to fill."""
        words = []
        for i, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                (self.folder / str(i)).write_bytes(argument.contiguous().view(torch.uint8).numpy().tobytes())
            words.append(self.folder / str(i) if isinstance(argument, torch.Tensor) else argument)
        words = ["-" if word is None else str(word) for word in words]
        files = [self.folder / f"result{i}" for i in range(len(results))]
        subprocess.run([*self.emulator, self.folder / "driver", *words, *files], check=True)
        for file, result in zip(files, results, strict=True):
            if result.numel() == 0:  # torch makes no tensor of an empty buffer
                continue
            result.copy_(torch.frombuffer(bytearray(file.read_bytes()), dtype=result.dtype).view_as(result))

    def project_gradients(self, case, *options):
        left, right = (s if s.ndim == 3 else s[None] for s in (case.left, case.right))
        in_features, out_features, p, q = case.sizes
        out = torch.full((len(case.lengths), q, p), torch.nan)
        self.run(
            *(*options, "project_gradients"),
            *(len(case.lengths), in_features, out_features, len(left), q, p, ELEMENTS.index(case.dtype)),
            *(case.activations, case.output_grads, case.offsets, left, right, case.scale),
            results=[out],
        )
        return out


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory):
    for program in (CROSS_COMPILER, EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    return Driver(tmp_path_factory.mktemp("aarch64"), CROSS_COMPILER, ["-static"], [EMULATOR])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """AVX512-BF16's products of pairs, by ordinary arithmetic on AVX2."""
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("needs g++ on x86-64")
    options = ["-march=x86-64-v3", "-DTRACKSTAR_BFLOAT16_PAIRS"]
    return Driver(tmp_path_factory.mktemp("pairs"), "g++", options)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize(("lengths", "sizes"), SHAPES)
def test_aarch64_project_gradients(aarch64, lengths, sizes, dtype, form):
    case = Case(lengths, sizes, **form, dtype=dtype)
    assert_accurate(case, aarch64.project_gradients(case))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("lengths", "sizes"), SHAPES)
def test_pairs_project_gradients(pairs, lengths, sizes, form):
    case = Case(lengths, sizes, **form, dtype=torch.bfloat16)
    got = pairs.project_gradients(case)
    assert_accurate(case, got)
    for b, row in enumerate(got):
        alone = Case(lengths, sizes, **form, dtype=torch.bfloat16)
        alone.activations, alone.output_grads = (t[0] for t in case.example(b).values())
        alone.lengths, alone.offsets = [lengths[b]], torch.tensor([0, lengths[b]])
        assert torch.equal(pairs.project_gradients(alone)[0], row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("Q", [1, 3, 17, 70])
def test_aarch64_score_topk(aarch64, Q, dtype):
    N, L, d, k = 301, 3, 65, 10
    generator = torch.Generator().manual_seed(0)
    queries, rows = (torch.randn(n, L, d, generator=generator) for n in (Q, N))
    rows = rows.to(dtype)
    scores, positions = torch.empty(Q, k), torch.empty(Q, k, dtype=torch.int64)
    arguments = (Q, k, N, L, d, int(dtype == torch.float16), 1, queries, rows, None)
    aarch64.run("score_topk", *arguments, results=[scores, positions])
    exact = queries.double().flatten(1) @ rows.double().flatten(1).T
    wide = queries.flatten(1) @ rows.float().flatten(1).T
    allowed = 2 * (wide - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (scores - exact.topk(k).values).abs().max() <= allowed
    assert (scores - exact.gather(1, positions)).abs().max() <= allowed


@pytest.mark.parametrize("dtype", ["int8", "int4", "sign"])
@pytest.mark.parametrize("Q", [1, 3, 17])
def test_aarch64_narrow_rows(aarch64, Q, dtype):
    """The same bits as the codes have as float32 rows, one query at a time."""
    N, L, d, k = 301, 3, 65, 10
    generator = torch.Generator().manual_seed(0)
    queries, rows = (torch.randn(n, L, d, generator=generator) for n in (Q, N))
    codes, scales, _ = encode_rows(rows, None, dtype)
    scores, positions = torch.empty(Q, k), torch.empty(Q, k, dtype=torch.int64)
    kind = ROW_TYPES.index(dtype)
    aarch64.run("score_topk", Q, k, N, L, d, kind, 1, queries, codes, scales, results=[scores, positions])
    numbers = decode_rows(codes, None, d)
    for q in range(Q):
        alone, places = torch.empty(1, k), torch.empty(1, k, dtype=torch.int64)
        arguments = (1, k, N, L, d, 0, 1, queries[q : q + 1], numbers, scales)
        aarch64.run("score_topk", *arguments, results=[alone, places])
        assert torch.equal(scores[q], alone[0]) and torch.equal(positions[q], places[0])


def test_aarch64_codes_of_int4(aarch64):
    unit = torch.randn(40, 1, 97, generator=torch.Generator().manual_seed(0)).div(5).clamp(-1, 1)
    codes = torch.empty(40, 1, code_size(97, torch.uint8), dtype=torch.uint8)
    aarch64.run("pack_best_codes", 40, 97, unit, results=[codes])
    assert torch.equal(codes, pack_best_codes(unit))
