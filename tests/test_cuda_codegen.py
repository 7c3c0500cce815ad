"""The machine code of the CUDA kernels, for GPUs that need not be here.

Of the extension if it was built with CUDA, otherwise compiled by an nvcc that is found: the system's, or that of the
packages which the test extra installs. Nothing is fetched.
"""

import collections
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton_device  # noqa: F401  (before triton)

from trackstar_kernels import _C

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
KERNELS = [
    f"{op}_kernel, {rows}, {columns}"
    for op in ("score", "mixed")
    for rows in ("float32", "float16", "bfloat16", "int8")
    for columns in (16, 64)
]
# Those of which an SM is to hold two blocks, where its shared memory does.
RESIDENT = {name for name in KERNELS if name.endswith("16")} | {
    f"score_kernel, {rows}, 64" for rows in ("float16", "int8")
}
MANGLED = re.compile(r"(score|mixed)_kernelILN\w*RowTypeE(\d)ELi(\d+)E")


def tool(name):
    """One of the programs that come with triton."""
    triton = importlib.util.find_spec("triton")
    if triton is None:
        pytest.skip("reading machine code needs triton's cuobjdump")
    return Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name


def find_nvcc():
    found = shutil.which("nvcc")
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations if packages else ():
        found = found or shutil.which("nvcc", path=str(Path(folder) / "cu13" / "bin"))
    return found


@pytest.fixture(scope="module")
def code_of(tmp_path_factory):
    """A file with the machine code for an architecture."""

    def code(arch):
        if _C.with_cuda:
            return Path(_C.__file__)
        nvcc = find_nvcc()
        if nvcc is None:
            pytest.skip("no nvcc: neither the system's nor the package nvidia-cuda-nvcc")
        output = tmp_path_factory.mktemp("cuda") / f"{arch}.cubin"
        source = ROOT / "csrc" / "cuda" / "scoring.cu"
        command = [nvcc, "-std=c++17", "-O3", f"-arch={arch}", "-cubin", f"-I{ROOT / 'csrc'}"]
        options = ["-Xptxas", "-warn-spills", "-Werror", "all-warnings"]
        subprocess.run([*command, *options, source, "-o", output], check=True)
        return output

    return code


def dump(file, arch, *options):
    command = [tool("cuobjdump"), "-arch", arch, *options, file]
    path = f"{tool('nvdisasm').parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
    ).stdout


def by_kernel(text):
    """{kernel: what is written about it}."""
    parts = re.split(r"Function ?:? (\S+?):?\n", text)[1:]
    found = {}
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        op, rows, columns = MANGLED.search(name).groups()
        rows = ("float32", "float16", "bfloat16", "int8")[int(rows)]
        found[f"{op}_kernel, {rows}, {columns}"] = part
    return found


def faults(name, usage, opcodes):
    """What the gate has against a kernel's machine code."""
    registers, stack, local = (int(usage[word]) for word in ("REG", "STACK", "LOCAL"))
    if stack > 0 or local > 0 or opcodes["STL"] + opcodes["LDL"] > 0:
        yield f"spills: stack {stack}"
    if registers > (128 if name in RESIDENT else 255):
        yield f"{registers} registers"
    for opcode in ("HMMA", "LDSM", "LDGSTS"):
        if opcodes[opcode] == 0:
            yield f"no {opcode}"


def slow_unless_built(arch):
    """Compiling for one architecture takes some fifteen seconds, the extension's code is there already."""
    return pytest.param(arch, marks=[] if _C.with_cuda or arch == "sm_90" else [pytest.mark.slow])


@pytest.mark.parametrize("arch", [slow_unless_built(arch) for arch in ARCHITECTURES])
def test_machine_code(code_of, arch):
    file = code_of(arch)
    usage = by_kernel(dump(file, arch, "--dump-resource-usage"))
    code = by_kernel(dump(file, arch, "-sass"))
    assert sorted(usage) == sorted(code) == sorted(KERNELS)
    found = []
    for name in KERNELS:
        opcodes = collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?(\w+)", code[name]))
        numbers = dict(re.findall(r"([A-Z]+):(\d+)", usage[name]))
        found += [f"{name}: {fault}" for fault in faults(name, numbers, opcodes)]
    assert not found, "\n".join(found)


GOOD = {"REG": "128", "STACK": "0", "LOCAL": "0"}
USED = {"HMMA": 8, "LDSM": 8, "LDGSTS": 8}


@pytest.mark.parametrize(
    ("usage", "opcodes", "fault"),
    [
        ({"STACK": "8"}, {}, "spills: stack 8"),
        ({"LOCAL": "8"}, {}, "spills: stack 0"),
        ({}, {"LDL": 1}, "spills: stack 0"),
        ({"REG": "129"}, {}, "129 registers"),
        ({}, {"HMMA": 0}, "no HMMA"),
        ({}, {"LDSM": 0}, "no LDSM"),
        ({}, {"LDGSTS": 0}, "no LDGSTS"),
    ],
)
def test_the_gate_closes(usage, opcodes, fault):
    name = "score_kernel, float16, 64"
    assert list(faults(name, GOOD, collections.Counter(USED))) == []
    assert list(faults(name, GOOD | usage, collections.Counter(USED | opcodes))) == [fault]


@pytest.mark.skipif(not _C.with_cuda, reason="built without CUDA")
def test_what_the_extension_carries():
    """Machine code for each architecture, and the intermediate form for those to come."""
    listed = subprocess.run(
        [tool("cuobjdump"), "--list-elf", "--list-ptx", _C.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert set(re.findall(r"\.(sm_\d+)\.cubin", listed)) == set(ARCHITECTURES)
    assert re.findall(r"\.(sm_\d+)\.ptx", listed) == ["sm_120"]


@pytest.mark.skipif(not _C.with_cuda, reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_call_without_a_driver_says_so():
    keys, rows = torch.empty(128, dtype=torch.int64), torch.zeros(100, 8)
    with pytest.raises(RuntimeError, match=r"CUDA: .*driver"):
        _C.cuda_score_topk(
            rows=_C.CudaRows(values=rows.data_ptr(), type="float32", stride=8, scales=0, N=100, L=1, d=8),
            queries=rows.data_ptr(),
            operand=rows.data_ptr(),
            query_scales=rows.data_ptr(),
            columns=16,
            survivors=_C.CudaSurvivors(keys=keys.data_ptr(), Q=1, k=3, slices=1, capacity=128, largest=True),
            stream=0,
        )
