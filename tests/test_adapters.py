"""PEFT adapters: alone, the weights below them alone, or both."""

import peft
import pytest
import torch
import trackstar
from conftest import explicit_rows, make_examples, make_gpt2, make_llama, relative_error
from trackstar import GradientCollector, SketchSpec

TOLERANCE = 2e-4

# peft asks transformers in a way that newer versions of it deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def adapted(make_model=make_llama, kind="LoraConfig", **options):
    torch.manual_seed(0)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(make_model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide a mistake in lora_A
                parameter.normal_(0, 0.1)
    return model.eval()


def check(model, spec):
    """All parameters trained, so that explicit gradients exist; what is captured does not depend on it."""
    examples = make_examples((5, 9, 17, 3))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    rows = torch.cat(list(trackstar.collect_rows(model, examples, spec=spec)))
    for parameter in frozen:
        parameter.requires_grad_(True)
    wanted = explicit_rows(model, examples, spec)
    for parameter in frozen:
        parameter.requires_grad_(False)
    assert relative_error(rows, wanted) < TOLERANCE
    ids = torch.tensor([examples[1]["input_ids"]])
    with GradientCollector(model, spec) as collector:
        (model(input_ids=ids, labels=ids).loss * 8).backward()
    assert relative_error(collector.rows, wanted[1:2]) < TOLERANCE


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def test_adapters_alone_by_default():
    model, spec = adapted(**LORA), SketchSpec(sketch=4)
    names = list(spec.block_of(model))
    assert len(names) == 2 * 2 * 3
    assert all(".lora_A.default" in name or ".lora_B.default" in name for name in names)
    check(model, spec)


@pytest.mark.parametrize(
    ("modules", "count"),
    [
        (["*", "!*.lora_?.*", "!*lm_head"], 14),
        (["*", "!*lm_head"], 14 + 12),
        (["*.base_layer"], 6),
    ],
    ids=["base", "both", "base of the adapted"],
)
def test_base_weights_by_pattern(modules, count):
    model, spec = adapted(**LORA), SketchSpec(sketch=4, modules=modules)
    assert len(spec.block_of(model)) == count
    check(model, spec)


def test_adapters_of_conv1d_layers():
    check(
        adapted(make_gpt2, r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        SketchSpec(sketch=4),
    )


def test_the_active_adapter_of_several():
    model = adapted(**LORA)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    assert all(".second" in name for name in SketchSpec().block_of(model))
    check(model, SketchSpec(sketch=2))


def test_adapters_inside_a_model_that_is_no_peft_model():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model, spec = peft.inject_adapter_in_model(config, make_llama()), SketchSpec(sketch=4)
    assert next(iter(spec.block_of(model))) == "model.layers.0.self_attn.q_proj.lora_A.default"
    check(model.eval(), spec)


def test_adapters_without_matrices():
    model = adapted(kind="IA3Config", target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(
        ValueError, match="the adapters of a model must have linear layers to attribute; PeftModel"
    ):
        GradientCollector(model, SketchSpec())
