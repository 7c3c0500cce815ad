"""Run by test_plan.py: prints the memory that a build and a query take, measured and planned, in bytes.

Measured is the peak of the process, pages of files included, above the same process after a tiny build and query,
which have loaded all code. The process is set up as a command's is.
"""

import sys
from pathlib import Path

import torch
import transformers
from capture_memory import peak
from scan_memory import resident
from torch._subclasses.fake_tensor import FakeTensorMode
from trackstar import SketchSpec, attribute, build_store
from trackstar.gradients.examples import encode_examples
from trackstar.gradients.heap import give_back_large_blocks
from trackstar.planning.needs import Corpus, Question
from trackstar.planning.plan import planned_job
from trackstar.planning.rates import GPUS

TINY = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    bos_token_id=None,
    eos_token_id=None,
)
LARGE = transformers.LlamaConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=4,
    num_attention_heads=8,
    bos_token_id=None,
    eos_token_id=None,
)
SPEC = SketchSpec(sketch=16)
EXAMPLES, LENGTH, QUERIES = 20, 128, 8
MEMORY = 64_000_000


def corpus(config, count, length):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (count, length), generator=generator)
    return [{"input_ids": row} for row in ids.tolist()]


def run(path, config, count, length):
    """Peaks of a build and of a query."""
    before = resident()
    model = transformers.LlamaForCausalLM(config).eval()
    store = build_store(path, model, corpus(config, count, length), spec=SPEC)
    built = peak() - before
    resident()
    queries = [{**example, "labels": example["input_ids"]} for example in corpus(config, QUERIES, length)]
    attribute(store, model, queries, k=5, mixing=0.5, memory=MEMORY)
    return built, peak() - before


def planned():
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = transformers.LlamaForCausalLM(LARGE).eval()
    examples = encode_examples(corpus(LARGE, EXAMPLES, LENGTH), None)
    options = {"dtype": "float16", "wide": None, "correction": "none", "rank": 1, "sample": 10_000}
    job = planned_job(model, SPEC, Corpus.of(examples), rates=GPUS["H100"], **options)
    return job.build_memory, job.query_memory(Question(QUERIES, LENGTH, 5, MEMORY))


def main(folder):
    give_back_large_blocks()
    torch.set_num_threads(1)
    wanted = planned()
    run(Path(folder) / "tiny", TINY, 20, 32)
    print(*run(Path(folder) / "large", LARGE, EXAMPLES, LENGTH))
    print(*wanted)


if __name__ == "__main__":
    main(sys.argv[1])
