"""csrc ← _C ← trackstar_kernels ← trackstar ← benchmarks, tests: nothing imports what stands above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "trackstar_kernels").rglob("*.py"))
ENGINE = sorted((ROOT / "python" / "trackstar").rglob("*.py"))


def imports(file):
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: str(file.relative_to(ROOT)))
def test_kernels_are_stateless(file):
    forbidden = {"trackstar", "mmap_ninja", "os", "pathlib", "logging", "transformers", "benchmarks"}
    assert not imports(file) & forbidden
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print"}


@pytest.mark.parametrize(
    "file", [f for f in KERNELS if f.name == "_reference.py"], ids=lambda file: file.parent.name
)
def test_references_need_torch_and_numpy_alone(file):
    assert imports(file) <= {"torch", "numpy", "math", "collections", "trackstar_kernels"}


@pytest.mark.parametrize("file", ENGINE, ids=lambda file: file.name)
def test_the_engine_imports_nothing_above_it(file):
    assert not imports(file) & {"benchmarks", "tests", "examples", "experiments"}


def modules_after(statement):
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_importing_the_kernels_is_light():
    loaded = modules_after("import trackstar_kernels")
    assert not loaded & {"transformers", "triton", "numba", "trackstar"}


def test_help_needs_nothing_heavy():
    loaded = modules_after("import trackstar.cli")
    assert not loaded & {"torch", "transformers", "triton", "numpy", "numba", "trackstar_kernels"}


def test_every_public_name_resolves():
    code = "import trackstar; print([getattr(trackstar, name).__name__ for name in trackstar.__all__])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    import trackstar

    assert out.strip() == str(trackstar.__all__)
