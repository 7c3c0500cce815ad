"""Which backend runs, and what is said of one that cannot."""

import importlib.util

import pytest
import torch

from trackstar_kernels import _dispatch, available_backends
from trackstar_kernels._architecture import architecture

TABLE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}


@pytest.fixture
def op(monkeypatch):
    """An op of the table above whose availability is decided anew."""
    monkeypatch.setitem(_dispatch._TABLES, "op", TABLE)
    _dispatch.lacks.cache_clear()
    yield lambda backend: _dispatch.implementation("package", "op", torch.device("cuda"), backend)
    _dispatch.lacks.cache_clear()


@pytest.fixture
def modules(monkeypatch):
    """Names of the modules that a call imports, none of which exists."""
    asked = []

    def import_module(name):
        asked.append(name)
        return type("module", (), {"op": name})

    monkeypatch.setattr(_dispatch.importlib, "import_module", import_module)
    return asked


@pytest.mark.parametrize(
    ("backend", "installed", "device", "capability", "missing"),
    [
        ("triton", False, True, (9, 0), "triton is not installed"),
        ("cuda", False, True, (9, 0), "trackstar_kernels was built without nvcc"),
        ("triton", True, False, (9, 0), "there is no CUDA device"),
        ("cuda", True, False, (9, 0), "there is no CUDA device"),
        ("triton", True, True, (7, 5), "the CUDA device is older than compute capability 8.0"),
        ("cuda", True, True, (7, 5), "the CUDA device is older than compute capability 8.0"),
    ],
)
def test_a_backend_that_cannot_run(op, modules, monkeypatch, backend, installed, device, capability, missing):
    monkeypatch.setitem(_dispatch._TABLES, "op", {"cpu": ("cpu",), "cuda": (backend, "reference")})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(_dispatch._C, "with_cuda", installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(
        ValueError,
        match=f"backend '{backend}' of op is not available: {missing}; available on cuda: reference",
    ):
        op(backend)
    assert op(None) == op("reference") == "package._reference"
    assert modules == ["package._reference"] * 2
    assert available_backends()["op"] == {"cpu": ("cpu",)} | ({"cuda": ("reference",)} if device else {})


def test_scoring_needs_nvidia(op, modules, monkeypatch):
    """What torch calls a CUDA device may be AMD's, for which there are Triton's kernels alone."""
    monkeypatch.setattr(_dispatch._C, "with_cuda", True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _dispatch.lacks("cuda") == "there is no CUDA device"
    assert _dispatch.lacks("triton") is None


def test_the_first_backend_that_can_run(op, modules, monkeypatch):
    monkeypatch.setattr(_dispatch._C, "with_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert op(None) == op("triton") == "package._triton"
    assert available_backends()["op"] == TABLE


def test_unknown_backends_and_devices(op):
    with pytest.raises(
        ValueError, match="backend of op on cuda must be one of triton, cuda, reference, got 'numba'"
    ):
        op("numba")
    with pytest.raises(ValueError, match="op runs on devices cpu, cuda; got meta"):
        _dispatch.implementation("package", "op", torch.device("meta"), None)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_120"),
        ((8, 9), "sm_120"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
    ],
)
def test_configurations_of_a_device(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert architecture(torch.device("cuda", 1)) == expected
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert architecture(torch.device("cuda", 1)) == "gfx942"
