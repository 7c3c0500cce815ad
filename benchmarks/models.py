"""The whole-model cases and an ordinary training step of them. Needs torch and transformers alone."""

import dataclasses

import torch
import transformers


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A randomly initialised Llama and a batch of token ids."""

    description: str
    config: dict[str, object]
    batch: int
    tokens: int

    def model(self) -> transformers.LlamaForCausalLM:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**self.config, max_position_embeddings=4096)
        ).eval()

    def ids(self) -> torch.Tensor:
        """(batch, tokens) int64."""
        shape = (self.batch, self.tokens)
        return torch.randint(0, self.config["vocab_size"], shape, generator=torch.Generator().manual_seed(0))


CASES = {
    "A": ModelCase(
        "Llama h768, 2 layers, vocabulary 8,192, 8×128 tokens",
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 2,
            "num_attention_heads": 12,
            "vocab_size": 8192,
        },
        batch=8,
        tokens=128,
    ),
    "B": ModelCase(
        "Llama h576, 4 layers, vocabulary 49,152 tied, 4×256 tokens",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 4,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49_152,
            "tie_word_embeddings": True,
        },
        batch=4,
        tokens=256,
    ),
}


def require_gradients(model: torch.nn.Module, embedding_only: bool) -> None:
    """Let all weights have a gradient, or the input embedding alone; drop what they have."""
    embedding = model.get_input_embeddings().weight
    for parameter in model.parameters():
        parameter.requires_grad_(not embedding_only or parameter is embedding)
        parameter.grad = None


def training_step(model: torch.nn.Module, ids: torch.Tensor, frozen: bool = False) -> None:
    """Forward and backward as a training loop has them; frozen: the embedding alone requires a gradient."""
    require_gradients(model, embedding_only=frozen)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
