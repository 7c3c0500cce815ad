"""Compile shipped Triton kernels for GPUs that are not here, and report what the machine code uses.

    python tests/aot.py ARCHITECTURE JOBS

JOBS is a JSON list of jobs, each {"module", "table", "key", "config", "types", "ones"}: one configuration of one entry
of a table of autotuners, compiled for arguments of the given Triton types, with "ones" for integers that are all 1.
The report, a JSON list on stdout, has one object per job. Needs a process without TRITON_INTERPRET.
"""

import collections
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Multiples of 16 in all models, so that rows can be copied 16 bytes at a time; counts of tokens and rows are not.
WIDTHS = {"in_features", "out_features", "right_rows", "left_rows", "p", "q", "size"}

# Arithmetic on bfloat16, which Triton's interpreter, our check of the numbers, cannot do.
NARROW_ARITHMETIC = re.compile(r"(arith\.(add|sub|mul|div|cmp|max|min|maxnum|minnum|neg)f|math\.)[^\n]*bf16")


def target(arch):
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def compiled(arch, job):
    module = importlib.import_module(job["module"])
    tuner = getattr(module, job["table"])[tuple(job["key"])]
    kernel, config = tuner.fn, tuner.configs[job["config"]]
    names = kernel.arg_names
    values = dict(config.kwargs)
    if job["ones"]:
        # The launcher makes a constant of an integer that is 1.
        values |= {
            parameter.name: 1
            for parameter in kernel.params
            if job["types"].get(parameter.name, "*")[0] != "*" and not parameter.do_not_specialize
        }
    signature = {name: "constexpr" if name in values else job["types"][name] for name in names}
    constants = {(names.index(name),): value for name, value in values.items()}
    # What the launcher finds out about the arguments of a usual call.
    aligned = [
        name
        for name, kind in job["types"].items()
        if name not in values and (kind[0] == "*" or name in WIDTHS)
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=target(arch),
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        },
    )


def report(kernel):
    found = {
        "shared": kernel.metadata.shared,
        "narrow arithmetic": bool(NARROW_ARITHMETIC.search(kernel.asm["ttir"])),
    }
    return found | (nvidia(kernel.asm) if "cubin" in kernel.asm else amd(kernel.asm))


def nvidia(asm):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = run("cuobjdump", "--dump-resource-usage", file.name)
        code = run("nvdisasm", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    opcodes = collections.Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?(\w+)", code, re.MULTILINE))
    return {"registers": int(registers), "stack": int(stack), "opcodes": opcodes}


def amd(asm):
    code = asm["amdgcn"]
    number = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", code)[1])  # noqa: E731
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size") + number("vgpr_spill_count"),
        "opcodes": collections.Counter(re.findall(r"^\s+([a-z]\w+)", code, re.MULTILINE)),
    }


def run(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    architecture, jobs = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps([report(compiled(architecture, job)) for job in jobs]))
