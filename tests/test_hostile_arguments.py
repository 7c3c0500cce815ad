"""Ops called with anything, in another process: a crash is a failed test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MANY = pytest.param("hostile_arguments.py", 2000, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("file", "examples"), [("hostile_arguments.py", 25), MANY, ("hostile_addresses.py", 1)]
)
def test_calls_return_or_raise(file, examples):
    command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*command, Path(__file__).with_name(file)],
        env=os.environ | {"HOSTILE_EXAMPLES": str(examples)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
