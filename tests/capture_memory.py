"""Run by test_memory.py: prints how much a pass with capture adds to the peak memory of one without, in bytes."""

import sys
from pathlib import Path

import torch
import transformers
from trackstar import GradientCollector, SketchSpec
from trackstar.gradients.examples import encode_examples
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.modules import select_weights
from trackstar.gradients.tap import GradientTap
from trackstar.optimizer.correction import Correction

HIDDEN, WIDE, EXAMPLES, LENGTH = 256, 1024, 128, 16


def peak():
    """Largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main(kind, threads):
    torch.set_num_threads(threads)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=512,
            hidden_size=HIDDEN,
            intermediate_size=WIDE,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    weights = select_weights(model)
    shapes = {name: weight.shape for name, weight in weights.items()}
    if kind == "rank":
        factors = {name: (torch.ones(4, o), torch.ones(4, i)) for name, (o, i) in shapes.items()}
        correction = Correction("rank", "test", factors=factors)
    else:
        scales = {name: torch.ones(o, i) for name, (o, i) in shapes.items()}
        correction = Correction("exact", "test", scales=scales)
    collector = GradientCollector(model, SketchSpec(), correction)
    lean = LeanPass(model, collector.modules.values())
    batch = lean.arrange(encode_examples([{"input_ids": list(range(LENGTH))}] * EXAMPLES, None))
    collector.offsets = batch.offsets
    with lean:
        for _ in range(2):
            with GradientTap(weights, lambda use: None):
                lean.run(batch)
        before = peak()
        with collector:
            lean.run(batch)
    print(peak() - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
