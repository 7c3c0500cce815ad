"""csrc ← _C ← trackstar_kernels ← trackstar ← benchmarks, tests: nothing imports what stands above it."""

import ast
import re
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


ABOVE_GRADIENTS = {"storage", "planning", "scoring", "ekfac", "evaluation", "exchange", "commands"}
FORBIDDEN = {
    "gradients": ABOVE_GRADIENTS,
    "optimizer": ABOVE_GRADIENTS,
    "storage": {"scoring", "ekfac", "evaluation", "exchange", "commands"},
    "planning": {"ekfac", "evaluation", "exchange", "commands"},
    "scoring": {"evaluation", "exchange", "commands"},
    "ekfac": {"evaluation", "exchange", "commands"},
    "evaluation": {"exchange", "commands"},
    "exchange": {"commands"},
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_folders_of_the_engine_import_nothing_above_them(folder):
    files = [file for file in ENGINE if file.parent.name == folder]
    assert files
    for file in files:
        named = re.findall(r"^\s*(?:from|import) trackstar\.(\w+)", file.read_text(), re.MULTILINE)
        assert not set(named) & FORBIDDEN[folder], file


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


def test_cuda_backends_can_be_imported_where_nothing_was_built_for_them():
    loaded = modules_after(
        "from trackstar_kernels import _C; [delattr(_C, n) for n in dir(_C) if n.lower().startswith('cuda')]; "
        "import trackstar_kernels.scoring._cuda"
    )
    assert "trackstar_kernels.scoring._cuda" in loaded


def test_help_needs_nothing_heavy():
    loaded = modules_after("import trackstar.cli")
    assert not loaded & {"torch", "transformers", "triton", "numpy", "numba", "trackstar_kernels"}


def test_every_public_name_resolves():
    code = "import trackstar; print([getattr(trackstar, name).__name__ for name in trackstar.__all__])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    import trackstar

    assert out.strip() == str(trackstar.__all__)
