"""The machine code of every shipped Triton kernel configuration, for GPUs that need not be here."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton_device  # noqa: F401  (before triton)

from trackstar_kernels._architecture import ARCHITECTURES

TABLES = [
    ("gradient", "CORRECTED"),
    ("gradient", "SKETCH"),
    ("gradient", "CONTRACT"),
    ("gradient", "REDUCE"),
    ("sketch", "FIELDS"),
    ("sketch", "COUNTSKETCH"),
    ("encode", "ENCODE"),
]
# Tables without a product, and without a pipeline that copies into shared memory.
ELEMENTWISE = {"REDUCE", "FIELDS", "COUNTSKETCH"}

# The largest products must use the generation's own instruction; skinny ones may use the older one as well.
TENSOR_CORES = {
    "sm_80": ("HMMA",),
    "sm_90": ("HGMMA", "HMMA"),
    "sm_100": ("UTCHMMA", "HMMA"),
    "sm_120": ("HMMA",),
    "gfx942": ("v_mfma",),
}
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
NARROW = {"x_ptr", "delta_ptr"}
TYPES = {"offsets_ptr": "*i64", "codes_ptr": "*fp16", "seed": "i64", "stream": "i64"}


def types(tuner, dtype):
    """Triton types of a kernel's arguments that are not fixed by its configurations."""
    names = [name for name in tuner.arg_names if name not in tuner.configs[0].kwargs]
    default = lambda name: "*fp32" if name.endswith("_ptr") else "i32"  # noqa: E731
    return {name: f"*{dtype}" if name in NARROW else TYPES.get(name, default(name)) for name in names}


def jobs(arch):
    """Every configuration that ``arch`` may run, with each input dtype it is for."""
    for op, table in TABLES:
        module = f"trackstar_kernels.{op}._triton"
        for key, tuner in getattr(importlib.import_module(module), table).items():
            if arch not in key and any(part in ARCHITECTURES for part in key):
                continue
            if not NARROW & set(tuner.arg_names):
                dtypes = ["fp32"]
            elif table == "CORRECTED":
                dtypes = ["fp32"] if key[1] == 4 else ["bf16", "fp16"]
            else:
                dtypes = ["bf16", "fp16", "fp32"]
            for config, dtype in itertools.product(range(len(tuner.configs)), dtypes):
                yield {
                    "module": module,
                    "table": table,
                    "key": key,
                    "config": config,
                    "types": types(tuner, dtype),
                    "ones": False,
                }


def in_short(job):
    """Sketches of 16 rows, bfloat16, the first depth of pipeline: the slow test compiles the rest."""
    dtypes = {kind for name, kind in job["types"].items() if name in NARROW}
    return dtypes <= {"*bf16"} and job["config"] == 0 and job["key"][-1:] != (64,)


def compile_all(arch, batch):
    """The report of tests/aot.py on each job."""
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), arch, json.dumps(batch)]
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=compiling, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def faults(arch, job, found):
    """What the gate has against one job's machine code."""
    opcodes = found["opcodes"]
    amd = arch.startswith("gfx")
    count = lambda *names: sum(n for op, n in opcodes.items() if op.startswith(names))  # noqa: E731
    if found["narrow arithmetic"]:
        yield "arithmetic on bfloat16"
    if found["stack"] > 0 or count("STL", "LDL", "scratch_") > 0:
        yield f"spills: stack {found['stack']}"
    if found["registers"] > (512 if amd else 255):
        yield f"{found['registers']} registers"
    if found["shared"] > SHARED_KIB[arch] * 1024:
        yield f"{found['shared']} bytes of shared memory"
    if job["table"] in ELEMENTWISE:
        return
    if job["table"] == "CORRECTED":
        if count(TENSOR_CORES[arch][0]) == 0:
            yield f"no {TENSOR_CORES[arch][0]}"
    elif count(*TENSOR_CORES[arch]) == 0:
        yield "no tensor cores"
    if not amd and count("LDGSTS", "UTMALDG") == 0:
        yield "no asynchronous copies"


def check(arch, batch):
    faulty = [
        f"{job['table']}{job['key']} configuration {job['config']}, {job['types']}: {fault}"
        for job, found in zip(batch, compile_all(arch, batch), strict=True)
        for fault in faults(arch, job, found)
    ]
    assert not faulty, "\n".join(faulty)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code(arch):
    check(arch, [job for job in jobs(arch) if in_short(job)])


def test_sizes_of_one_compile():
    """The launcher turns an integer that is 1 into a constant, which has not all of an integer's methods."""
    compile_all("sm_80", [job | {"ones": True} for job in jobs("sm_80") if in_short(job)])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code_of_everything(arch):
    check(arch, list(jobs(arch)))


CLEAN = {
    "narrow arithmetic": False,
    "stack": 0,
    "registers": 255,
    "shared": 163 * 1024,
    "opcodes": {"HMMA": 8, "LDGSTS": 2},
}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"narrow arithmetic": True}, ["arithmetic on bfloat16"]),
        ({"stack": 8}, ["spills: stack 8"]),
        ({"opcodes": {"HMMA": 8, "LDGSTS": 2, "STL": 1}}, ["spills: stack 0"]),
        ({"registers": 256}, ["256 registers"]),
        ({"shared": 163 * 1024 + 1}, ["166913 bytes of shared memory"]),
        ({"opcodes": {"FFMA": 8, "LDGSTS": 2}}, ["no HMMA"]),
        ({"opcodes": {"HMMA": 8, "LDG": 2}}, ["no asynchronous copies"]),
    ],
)
def test_the_gate_closes(change, fault):
    job = {"table": "CORRECTED"}
    assert list(faults("sm_80", job, CLEAN)) == []
    assert list(faults("sm_80", job, CLEAN | change)) == fault
