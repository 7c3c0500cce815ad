"""How close each optimizer correction comes to the exact one: ``python -m benchmarks.correction``.

A small Llama is trained with Adam on the source of Python's standard library; then, for fresh examples, the
cosine between the gradient corrected exactly and the gradient corrected by each approximation is taken over all
captured modules together. Nothing is timed.
"""

import argparse
import statistics
import sysconfig
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from trackstar.gradients.modules import select_weights
from trackstar.optimizer.correction import fit_rank
from trackstar.optimizer.second_moments import SecondMoments

from benchmarks.machine import save


def make_text(sequences):
    """Bytes of the standard library, as (sequences, 129) token ids."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    text = torch.frombuffer(
        bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8
    ).long()
    starts = torch.randint(0, len(text) - 129, (sequences,), generator=torch.Generator().manual_seed(0))
    return torch.stack([text[start : start + 129] for start in starts.tolist()])


def train(steps):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in make_text(8 * steps).split(8):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model, optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--iterations", type=int, nargs="*", default=[20, 60, 240], help="sweeps of the fit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, optimizer = train(arguments.steps)
    second = SecondMoments.from_optimizer(optimizer.state_dict(), model)
    exact = second.correction("exact").scales
    approximations = {"none": {name: torch.ones_like(scale) for name, scale in exact.items()}}
    approximations["Adafactor's rank 1"] = {
        name: (torch.outer(v.mean(1), v.mean(0)) / v.mean()).rsqrt() for name, v in second.moments.items()
    }
    for rank in (1, 2, 4, 8):
        for iterations in arguments.iterations:
            fitted = {name: fit_rank(v, exact[name], rank, iterations) for name, v in second.moments.items()}
            label = f"fitted rank {rank}, {iterations} sweeps"
            approximations[label] = {name: u.T @ w for name, (u, w) in fitted.items()}
    cosines = {name: [] for name in approximations}
    modules = {name: weight.module for name, weight in select_weights(model).items()}
    for example in make_text(8 * arguments.steps + arguments.examples)[-arguments.examples :]:
        model.zero_grad()
        model(input_ids=example[None], labels=example[None]).loss.backward()
        wanted = torch.cat([(module.weight.grad * exact[name]).flatten() for name, module in modules.items()])
        for label, scales in approximations.items():
            got = torch.cat(
                [(module.weight.grad * scales[name]).flatten() for name, module in modules.items()]
            )
            cosines[label].append(torch.cosine_similarity(got, wanted, dim=0).item())
    table = Table("correction", "mean cosine", "smallest", title="Cosine to the exactly corrected gradient")
    for label, values in cosines.items():
        table.add_row(label, f"{statistics.mean(values):.3f}", f"{min(values):.3f}")
    Console().print(table)
    cases = [{"correction": label, "cosines": values} for label, values in cosines.items()]
    Console().print(f"written: {save('correction', cases)}")


if __name__ == "__main__":
    main()
