"""Times bergson's gradient collection against a training step in the same process; run by ``benchmarks.peers``.

Executed by the Python of an environment that has bergson, and not this project: from here it imports only what needs
torch and transformers alone. Writes JSON to the file it is given: {line: {"seconds": …, "of full": …}}.
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from bergson.collector.collector import CollectorComputer, HookCollectorBase
from bergson.collector.gradient_collectors import GradientCollector
from bergson.config import IndexConfig
from bergson.data import pad_and_tensor
from bergson.gradients import AdafactorNormalizer, AdamNormalizer
from bergson.utils.worker_utils import processor_for, setup_model_and_peft
from datasets import Dataset

from benchmarks.models import CASES, require_gradients, training_step
from benchmarks.timing import Run, interleaved, ratio, summary

LINES = {
    "none p16": (16, None),
    "none p64": (64, None),
    "Adafactor p16": (16, AdafactorNormalizer),
    "Adam p16": (16, AdamNormalizer),
    "Adam p64": (64, AdamNormalizer),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the saved model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ids = CASES["A"].ids()
    with tempfile.TemporaryDirectory() as folder:
        config = IndexConfig(run_path=f"{folder}/index", model=arguments.model, precision="fp32")
        model, _ = setup_model_and_peft(config)
        runs = {"full": lambda: training_step(model, ids), "frozen": lambda: training_step(model, ids, True)}
        for line, (sketch, normalizer) in LINES.items():
            runs[line] = collection(model, ids, f"{folder}/{line}", sketch, normalizer)
        seconds = interleaved(runs, arguments.rounds)
    lines = {
        line: {"seconds": summary(measured), "of full": ratio(measured, seconds["full"])}
        for line, measured in seconds.items()
    }
    versions = {"bergson": version("bergson"), "torch": torch.__version__}
    arguments.output.write_text(json.dumps({"versions": versions, "lines": lines}))


def collection(
    model: torch.nn.Module, ids: torch.Tensor, path: str, sketch: int, normalizer: type | None
) -> Run:
    """One batch as its build takes it (CollectorComputer.run_with_collector_hooks), rows written to its index."""
    config = IndexConfig(run_path=path, projection_dim=sketch)
    config.partial_run_path.mkdir()
    normalizers = {} if normalizer is None else make_normalizers(model, normalizer)
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    collector = GradientCollector(
        model=model.base_model, data=data, cfg=config, processor=processor_for(config, normalizers)
    )
    computer = CollectorComputer(model, data, collector=collector, cfg=config)
    indices = list(range(len(data)))

    def run() -> None:
        require_gradients(model, embedding_only=True)  # as setup_model_and_peft leaves the model
        batch = data[indices]
        x, y, _, mask = pad_and_tensor(batch["input_ids"], device=model.device, sync_max_len=False)
        with collector.with_batch(mask):
            losses = computer.forward_backward(model, x, y, batch)
        collector.process_batch(indices, losses=losses)

    run()
    if not (abs(collector.builder.grad_buffer).sum(axis=1) > 0).all():
        raise SystemExit(f"{path}: bergson left rows of zeros")
    return run


def make_normalizers(model: torch.nn.Module, normalizer: type) -> dict[str, object]:
    """Positive second moments of every module that it collects: their values do not change the time."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, (_, shape, _) in HookCollectorBase.discover_targets(model.base_model).items():
        moments = AdamNormalizer(torch.rand(shape, generator=generator) + 0.1)
        made[name] = moments if normalizer is AdamNormalizer else moments.to_adafactor()
    return made


if __name__ == "__main__":
    main()
