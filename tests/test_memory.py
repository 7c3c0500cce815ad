"""What capture costs in memory, as the system sees it: the C++ kernels' scratch and torch's allocations alike."""

import json
import subprocess
import sys

import pytest

HIDDEN, WIDE, EXAMPLES, LENGTH = 256, 1024, 128, 16

# Peak resident memory of a lean pass without capture, and how much a pass with capture adds to it.
MEASURE = f"""
import json, sys
import torch, transformers
from pathlib import Path
from trackstar import GradientCollector, SketchSpec
from trackstar.correction import Correction
from trackstar.examples import encode_examples
from trackstar.lean import LeanPass
from trackstar.modules import fan, select_modules
from trackstar.tap import GradientTap

def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

torch.set_num_threads(int(sys.argv[2]))
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=512, hidden_size={HIDDEN}, intermediate_size={WIDE}, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, bos_token_id=None, eos_token_id=None))
modules = select_modules(model)
fans = {{name: fan(module) for name, module in modules.items()}}
correction = {{
    "rank": Correction("rank", "test", factors={{n: (torch.ones(4, o), torch.ones(4, i)) for n, (i, o) in fans.items()}}),
    "exact": Correction("exact", "test", scales={{n: torch.ones(o, i) for n, (i, o) in fans.items()}}),
}}[sys.argv[1]]
collector = GradientCollector(model, SketchSpec(), correction)
lean = LeanPass(model, modules.values())
batch = lean.arrange(encode_examples([{{"input_ids": list(range({LENGTH}))}}] * {EXAMPLES}, None))
collector.offsets = batch.offsets
with lean:
    for _ in range(2):
        with GradientTap(modules, lambda *arguments: None):
            lean.run(batch)
    before = peak()
    with collector:
        lean.run(batch)
print(json.dumps(peak() - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("correction", "threads"), [("rank", 1), ("exact", 2)])
def test_capture_adds_less_than_one_layer_s_buffers(correction, threads):
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, correction, str(threads)], capture_output=True, text=True, check=True
    )
    added = json.loads(child.stdout)
    tokens, per_example = EXAMPLES * LENGTH, EXAMPLES * HIDDEN * WIDE
    layer = tokens * (4 * 2 * HIDDEN + 3 * (HIDDEN + WIDE))  # inputs and output gradients of its 7 modules
    assert added < 4 * layer
    assert layer < per_example / 2  # so that one module's gradients, kept for every example, would show
