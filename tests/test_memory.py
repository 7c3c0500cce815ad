"""What capture costs in memory, as the system sees it: the C++ kernels' scratch and torch's allocations alike."""

import subprocess
import sys
from pathlib import Path

import pytest
from capture_memory import EXAMPLES, HIDDEN, LENGTH, WIDE
from scan_memory import CASES, MEMORY

CHILD = Path(__file__).with_name("capture_memory.py")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("correction", "threads"), [("rank", 1), ("exact", 2)])
def test_capture_adds_less_than_one_layer_s_buffers(correction, threads):
    command = [sys.executable, CHILD, correction, str(threads)]
    added = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    tokens, per_example = EXAMPLES * LENGTH, EXAMPLES * HIDDEN * WIDE
    layer = tokens * (4 * 2 * HIDDEN + 3 * (HIDDEN + WIDE))  # inputs and output gradients of its 7 modules
    assert added < 4 * layer
    assert layer < per_example / 2  # one module's gradients, kept for every example, would show


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_scan_keeps_within_its_memory(tmp_path):
    """Pages of the mapped store included, on a store of six times as much; without a limit the same scan exceeds it."""
    command = [sys.executable, CHILD.with_name("scan_memory.py"), tmp_path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    added = {name: int(line) for name, line in zip(CASES, lines, strict=True)}
    assert added.pop("unlimited") > 2 * MEMORY
    assert max(added.values()) <= MEMORY, added
