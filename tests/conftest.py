"""Tiny models and corpora that every test of the engine shares."""

import os

# The suite must not reach for a network, whatever a model's configuration says.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
import triton_device  # noqa: F401  (before anything imports triton)
from hypothesis import settings

# These machines are shared: no test judges time, and every run draws the same cases.
settings.register_profile("trackstar", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("trackstar")

# Tiny tensors gain nothing from threads; tests of threading set their own count.
torch.set_num_threads(1)

transformers.logging.set_verbosity_error()

VOCABULARY = 97


# Grouped queries: 4 heads, 2 key–value heads.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


def make_llama(**changes):
    """Grouped queries and tied embeddings."""
    config = SIZES | {"tie_word_embeddings": True} | changes
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def make_neox():
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def make_gpt2(**changes):
    """Conv1D layers, whose weights are stored the other way round."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=None,
            eos_token_id=None,
            **changes,
        )
    )


FAMILIES = {"llama": make_llama, "neox": make_neox, "gpt2": make_gpt2}


@pytest.fixture(params=list(FAMILIES))
def model(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return make_llama().eval()


def make_examples(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


def project(spec, weight, gradient):
    """P_L g P_Rᵀ of a matrix, P g of a vector."""
    if weight.kind in ("bias", "norm"):
        return spec.vector_projection(weight.name, len(gradient)).double() @ gradient
    left, right = spec.projections(weight.name, gradient.shape[1], gradient.shape[0])
    return left.double() @ gradient @ right.double().T


def explicit_rows(model, examples, spec, scales=None):
    """The definition: one backward pass per example, every gradient formed, P_L (g ∘ scale) P_Rᵀ in float64."""
    parameters = dict(model.named_parameters())
    weights = spec.weights(model)
    block_of = spec.block_of(model)
    rows = torch.zeros(len(examples), max(block_of.values()) + 1, spec.block_size, dtype=torch.float64)
    for i, example in enumerate(examples):
        ids = torch.tensor([example["input_ids"]])
        labels = torch.tensor([example.get("labels", example["input_ids"])])
        if ids.shape[1] < 2:
            continue
        model.zero_grad()
        logits = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").backward()
        for name, weight in weights.items():
            gradient = parameters[weight.parameter].grad
            if gradient is None:  # a mixture's expert that saw no token
                continue
            gradient = weight.view(gradient).double()
            if scales is not None:
                gradient = gradient * scales[name]
            rows[i, block_of[name]] += project(spec, weight, gradient).flatten()
    model.zero_grad()
    return rows


def relative_error(got, wanted):
    """Largest over rows of ‖got − wanted‖ / ‖wanted‖; rows that should be zero count absolutely."""
    got, wanted = got.double().flatten(1), wanted.double().flatten(1)
    return ((got - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-6)).max().item()


@pytest.fixture
def unsynced(monkeypatch):
    """Leave out fsync, most of a tiny build's time: it protects from power failures, which no test stages."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def files_below(folder):
    """{path below ``folder``: bytes} of every file."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }
