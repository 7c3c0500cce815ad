"""tests/kernel_driver.cpp and the kernels of every level, built with GCC's sanitizers."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_other_processors import ROOT, Driver

# As in CMakeLists.txt: namespaces of the levels, their options, and the kernels compiled for each.
ALL = ("scoring_kernel", "coded_kernel", "gradient_kernel", "trellis_kernel")
LEVELS = {
    "baseline": ("baseline", [], ALL),
    "x86-64-v3": ("v3", ["-march=x86-64-v3"], (*ALL, "table_kernel")),
    "avx-vnni": ("v3_vnni", ["-march=x86-64-v3", "-mavxvnni"], ("coded_kernel",)),
    "x86-64-v4": ("v4", ["-march=x86-64-v4"], ALL),
    "avx512-vnni": (
        "v4_vnni",
        ["-march=x86-64-v4", "-mavx512vnni", "-mavx512vbmi"],
        ("coded_kernel", "table_kernel"),
    ),
    "avx512-bf16": ("v4_bf16", ["-march=x86-64-v4", "-mavx512bf16"], ("gradient_kernel",)),
    "amx": (
        "amx",
        ["-march=x86-64-v4", "-mavx512vnni", "-mavx512vbmi", "-mamx-tile", "-mamx-int8"],
        ("coded_kernel",),
    ),
}
MEMORY = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
THREADS = ("-fsanitize=thread",)
KERNELS = ROOT / "csrc" / "cpu"


class SanitizedDriver(Driver):
    """The driver, and what it was linked from."""

    def __init__(self, folder, sanitize):
        if platform.machine() != "x86_64" or shutil.which("g++") is None:
            pytest.skip("needs g++ on x86-64")
        self.folder, self.emulator, self.sanitize = folder, (), sanitize
        self.common = ["g++", "-std=gnu++17", "-O1", "-g1", "-w", "-fopenmp", f"-I{ROOT / 'csrc'}", *sanitize]
        self.common += [f"-DTRACKSTAR_HAS_{namespace}" for namespace, _, _ in LEVELS.values()]
        units = [
            (KERNELS / f"{kernel}.cpp", f"{namespace}_{kernel}", [*options, f"-DTRACKSTAR_ISA={namespace}"])
            for namespace, options, kernels in LEVELS.values()
            for kernel in kernels
        ]
        sources = [path for path in sorted(KERNELS.glob("*.cpp")) if not path.stem.endswith("_kernel")]
        sources.append(ROOT / "tests" / "kernel_driver.cpp")
        if sanitize == THREADS:
            sources.append(ROOT / "tests" / "watched_openmp.cpp")
        units += [(path, path.stem, []) for path in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.objects = list(pool.map(lambda unit: self.compile(*unit), units))
        self.link()

    def compile(self, source, name, options=()):
        target = self.folder / f"{name}.o"
        subprocess.run([*self.common, *options, "-c", source, "-o", target], check=True)
        return target

    def link(self):
        openmp = [] if self.sanitize == THREADS else ["-fopenmp"]
        options = ["-pthread", *self.sanitize, *openmp]
        subprocess.run(["g++", *self.objects, *options, "-o", self.folder / "driver"], check=True)
