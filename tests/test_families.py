"""Causal language models of transformers, tiny: rows of the lean pass against explicit backward passes."""

import pytest
import torch
import trackstar
import transformers
from conftest import SIZES, explicit_rows, make_examples, relative_error
from trackstar import GradientCollector, SketchSpec

TOLERANCE = 2e-4
LENGTHS = (5, 9, 17, 3, 12, 9)

ATTENTION = {"head_dim": 8, "pad_token_id": 0}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
MIXTURE = ATTENTION | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = MIXTURE | {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

DENSE = {
    "Llama": ATTENTION,
    "Qwen2": ATTENTION,
    "Qwen3": ATTENTION,
    "Mistral": ATTENTION,
    "Gemma": ATTENTION,
    "Gemma2": ATTENTION,
    "Gemma3": ATTENTION,
    "Phi": ATTENTION,
    "Phi3": ATTENTION,
    "GPT2": OLD,
    "GPTNeoX": ATTENTION,
    "GPTJ": OLD | {"rotary_dim": 8},
    "CodeGen": OLD | {"rotary_dim": 8},
    "GPTBigCode": OLD,
    "Olmo": ATTENTION,
    "Olmo2": ATTENTION,
    "SmolLM3": ATTENTION,
    "Falcon": {"alibi": False},
    "StableLm": ATTENTION,
    "Cohere": ATTENTION,
    "Granite": ATTENTION,
    "Starcoder2": ATTENTION,
    "Bloom": OLD,
    "OPT": {"ffn_dim": 44, "word_embed_proj_dim": 32, "pad_token_id": 0},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "XGLM": {"d_model": 32, "ffn_dim": 44, "num_layers": 2, "attention_heads": 4, "pad_token_id": 0},
    "BioGpt": {"pad_token_id": 0},
    "Glm4": ATTENTION,
    "Nemotron": ATTENTION,
    "Persimmon": {},
    "Exaone4": ATTENTION,
    "Helium": ATTENTION,
    "CpmAnt": {"dim_head": 8, "dim_ff": 44, "prompt_length": 4, "pad_token_id": 0},
}
"""CpmAnt attends to what follows in its prompt, so that even padding changes it."""

MIXTURES = {
    "Mixtral": MIXTURE
    | {"intermediate_size": 48},  # torch multiplies narrow experts of multiples of 16 bytes
    "Qwen2Moe": MIXTURE,
    "Qwen3Moe": MIXTURE,
    "Olmoe": MIXTURE,
    "GptOss": MIXTURE,
    "DeepseekV2": LATENT,
    "DeepseekV3": LATENT,
    "GraniteMoe": MIXTURE,
    "Phimoe": MIXTURE,
    "JetMoe": ATTENTION | {"num_local_experts": 4, "kv_channels": 8},
    "Afmoe": MIXTURE,
    "Llama4": MIXTURE | {"intermediate_size_mlp": 44},
}

NAMES = {
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
    "Llama4": ("Llama4TextConfig", "Llama4ForCausalLM"),
    "Nemotron": ("NemotronConfig", "NemotronForCausalLM"),
}


def make(name):
    config, model = NAMES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**SIZES | (DENSE | MIXTURES)[name]))
    with torch.no_grad():
        for name, parameter in made.named_parameters():  # large enough for every module to matter
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.08)
    return made.eval()


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
def test_rows_equal_explicit_backward_passes(name):
    model, spec, examples = make(name), SketchSpec(sketch=4), make_examples(LENGTHS)
    rows = torch.cat(list(trackstar.collect_rows(model, examples, spec=spec)))
    assert relative_error(rows, explicit_rows(model, examples, spec)) < TOLERANCE


@pytest.mark.parametrize("name", list(MIXTURES))
def test_a_batch_of_somebody_elses_loop(name):
    model, spec, examples = make(name), SketchSpec(sketch=4), make_examples((9, 9, 9))
    ids = torch.tensor([example["input_ids"] for example in examples])
    with GradientCollector(model, spec) as collector:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    assert relative_error(collector.rows, explicit_rows(model, examples, spec)) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "model", "changes", "message"),
    [
        (
            "MambaConfig",
            "MambaForCausalLM",
            {"state_size": 8},
            r"module 'backbone.layers.0.mixer.dt_proj' \(and 1 more\) did not run; "
            r"leave it out: SketchSpec\(modules=\['!backbone.layers.\*.mixer.dt_proj'\]\)",
        ),
        (
            "BartConfig",
            "BartForCausalLM",
            {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 44},
            r"module 'model.decoder.layers.0.encoder_attn.k_proj' \(and 7 more\) did not run",
        ),
    ],
)
def test_a_model_with_unused_matrices_says_how_to_leave_them_out(config, model, changes, message):
    torch.manual_seed(0)
    sizes = SIZES | {"pad_token_id": 0} | changes
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
    examples = make_examples((6, 9))
    with pytest.raises(RuntimeError, match=message) as caught:
        list(trackstar.collect_rows(made, examples))
    asked = str(caught.value).split("SketchSpec(modules=")[1].rstrip(")")
    spec = SketchSpec(sketch=4, modules=[pattern.strip("[] '") for pattern in asked.split(",")])
    rows = torch.cat(list(trackstar.collect_rows(made, examples, spec=spec)))
    assert relative_error(rows, explicit_rows(made, examples, spec)) < TOLERANCE
