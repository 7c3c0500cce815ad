"""Scoring in C++ under AddressSanitizer and UndefinedBehaviorSanitizer, on arrays that end where they must."""

import itertools
import platform
import shutil
import subprocess

import pytest
import torch
from test_other_processors import ROOT, ROW_TYPES, Driver

import trackstar_kernels as tk
from trackstar_kernels import _C

pytestmark = pytest.mark.slow

# As in CMakeLists.txt: namespaces of the levels, their options, and the kernels compiled for each.
ALL = ("scoring_kernel", "coded_kernel", "gradient_kernel")
LEVELS = {
    "baseline": ([], ALL),
    "x86-64-v3": (["-march=x86-64-v3"], (*ALL, "table_kernel")),
    "avx-vnni": (["-march=x86-64-v3", "-mavxvnni"], ("coded_kernel",)),
    "x86-64-v4": (["-march=x86-64-v4"], ALL),
    "avx512-vnni": (["-march=x86-64-v4", "-mavx512vnni", "-mavx512vbmi"], ("coded_kernel", "table_kernel")),
}
NAMESPACES = dict(zip(LEVELS, ("baseline", "v3", "v3_vnni", "v4", "v4_vnni"), strict=True))
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class SanitizedDriver(Driver):
    """tests/kernel_driver.cpp with the kernels of every level."""

    def __init__(self, folder):
        self.folder, self.emulator = folder, ()
        common = ["g++", "-std=gnu++17", "-O1", "-w", f"-I{ROOT / 'csrc'}", *SANITIZE]
        common += [f"-DTRACKSTAR_HAS_{namespace}" for namespace in NAMESPACES.values()]
        objects = []
        for level, (options, kernels) in LEVELS.items():
            for kernel in kernels:
                objects.append(folder / f"{NAMESPACES[level]}_{kernel}.o")
                source = ROOT / "csrc" / "cpu" / f"{kernel}.cpp"
                define = f"-DTRACKSTAR_ISA={NAMESPACES[level]}"
                subprocess.run([*common, *options, define, "-c", source, "-o", objects[-1]], check=True)
        sources = [p for p in (ROOT / "csrc" / "cpu").glob("*.cpp") if not p.stem.endswith("_kernel")]
        sources.append(ROOT / "tests" / "kernel_driver.cpp")
        subprocess.run([*common, *sources, *objects, "-o", folder / "driver"], check=True)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("needs g++ on x86-64")
    return SanitizedDriver(tmp_path_factory.mktemp("sanitized"))


@pytest.mark.parametrize("level", [level for level in LEVELS if level in _C.available_isas()])
@pytest.mark.parametrize("dtype", ["int8", "int4", "sign"])
@pytest.mark.parametrize("Q", [1, 2, 3, 4, 7, 12, 33])
def test_narrow_rows(driver, level, dtype, Q):
    """Odd shapes, with and without scales, the largest and the smallest."""
    isa = list(LEVELS).index(level)
    shapes = ((1, 1, 1, 1), (65, 2, 33, 9), (131, 3, 97, 131), (70, 1, 255, 3))
    for (N, L, d, k), scaled, largest in itertools.product(shapes, (True, False), (1, 0)):
        generator = torch.Generator().manual_seed(N)
        queries, rows = (torch.randn(n, L, d, generator=generator) for n in (Q, N))
        codes, scales, norms = tk.encode_rows(rows, None, dtype)
        sizes = (Q, k, N, L, d, ROW_TYPES.index(dtype))
        scores, positions = torch.empty(Q, k), torch.empty(Q, k, dtype=torch.int64)
        arrays = (queries, codes, scales if scaled else None)
        driver.run("isa", isa, "score_topk", *sizes, largest, *arrays, results=[scores, positions])
        decoded = tk.decode_rows(codes, scales if scaled else None, d)
        exact = queries.double().flatten(1) @ decoded.double().flatten(1).T
        wanted = exact.sort(dim=1, descending=bool(largest)).values[:, :k]
        assert (scores - wanted).abs().max() <= 1e-5 * max(1, exact.abs().max())
        if not scaled:
            continue
        rescored = torch.empty(Q, dtype=torch.int64)
        results = [scores, positions, rescored]
        driver.run(
            "isa", isa, "rescored_topk", *sizes, 1, largest, *arrays, rows.half(), norms, results=results
        )
        exact = queries.double().flatten(1) @ rows.half().double().flatten(1).T
        wanted = exact.sort(dim=1, descending=bool(largest)).values[:, :k]
        assert (scores - wanted).abs().max() <= 1e-5 * max(1, exact.abs().max())
        assert ((rescored >= k) & (rescored <= N)).all()


@pytest.mark.parametrize("level", ["baseline", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("Q", [1, 4, 5, 18, 33])
def test_float_rows(driver, level, dtype, Q):
    if level not in _C.available_isas():
        pytest.skip("this machine lacks the level")
    isa = list(LEVELS).index(level)
    for N, L, d, k in ((1, 1, 1, 1), (65, 2, 33, 9), (131, 3, 97, 131), (70, 1, 259, 3)):
        generator = torch.Generator().manual_seed(N)
        queries, rows = (torch.randn(n, L, d, generator=generator) for n in (Q, N))
        rows = rows.to(dtype)
        scores, positions = torch.empty(Q, k), torch.empty(Q, k, dtype=torch.int64)
        kind = ROW_TYPES.index(str(dtype).removeprefix("torch."))
        arguments = (Q, k, N, L, d, kind, 1, queries, rows, None)
        driver.run("isa", isa, "score_topk", *arguments, results=[scores, positions])
        exact = queries.double().flatten(1) @ rows.double().flatten(1).T
        assert (scores - exact.topk(k).values).abs().max() <= 1e-5 * max(1, exact.abs().max())
