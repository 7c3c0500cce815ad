"""kronfluence's scores of a model and tokens that ``benchmarks.agreement`` saved, which runs this.

Knows nothing of this project. Writes scores.safetensors into the folder it is given.
"""

import argparse
from pathlib import Path

import torch
import transformers
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D


class LanguageModeling(Task):
    """The summed negative log-likelihood of tokens, or of drawn labels; tokens that reach no loss are masked."""

    def __init__(self, modules: list[str], same_labels: bool) -> None:
        self.modules = modules
        self.same_labels = same_labels

    def compute_train_loss(self, batch, model, sample=False):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        if sample:
            labels = batch["drawn"].flatten()
            if not self.same_labels:
                labels = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return self.modules

    def get_attention_mask(self, batch):
        mask = torch.ones_like(batch["input_ids"])
        mask[:, -1] = 0
        return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("rank", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokens = load_file(arguments.folder / "tokens.safetensors")
    examples = [
        {"input_ids": ids, "labels": ids, "drawn": drawn}
        for ids, drawn in zip(tokens["examples"], tokens["drawn"], strict=True)
    ]
    queries = [
        {"input_ids": ids, "labels": labels}
        for ids, labels in zip(tokens["queries"], tokens["targets"], strict=True)
    ]
    found = {}
    for name, same_labels, rank in (
        ("same labels", True, None),
        ("same labels, thin", True, arguments.rank),
        ("own labels", False, None),
    ):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel.from_pretrained(arguments.folder / "model").eval()
        task = LanguageModeling(linear_layers(model), same_labels)
        analyzer = Analyzer(name, prepare_model(model, task), task, cpu=True, disable_tqdm=True)
        factors = FactorArguments(strategy="ekfac")
        analyzer.fit_all_factors("factors", dataset=examples, per_device_batch_size=16, factor_args=factors)
        analyzer.compute_pairwise_scores(
            "scores",
            factors_name="factors",
            query_dataset=queries,
            train_dataset=examples,
            per_device_query_batch_size=8,
            per_device_train_batch_size=16,
            # None is 0.1 of the mean eigenvalue.
            score_args=ScoreArguments(damping_factor=None, query_gradient_low_rank=rank, use_full_svd=True),
        )
        found[name] = analyzer.load_pairwise_scores("scores")["all_modules"].contiguous()
    save_file(found, arguments.folder / "scores.safetensors")


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the attention and MLP layers, after each Conv1D, which kronfluence does not know, became a Linear."""
    names = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for name in names:
        conv = model.get_submodule(name)
        linear = nn.Linear(*conv.weight.shape)
        linear.weight.data, linear.bias.data = conv.weight.data.T.contiguous(), conv.bias.data
        model.set_submodule(name, linear)
    return names


if __name__ == "__main__":
    main()
