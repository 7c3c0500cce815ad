"""Narrow weights, and the check of whether a model's own numerics move rows."""

import pytest
import torch
import trackstar
from conftest import explicit_rows, make_examples, make_llama, relative_error
from test_families import make
from trackstar import GradientCollector, SketchSpec
from trackstar.gradients.examples import encode_examples
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.numerics import check_numerics
from trackstar.gradients.tap import GradientTap

LENGTHS = (5, 9, 17, 3, 30)


def check(model, examples=None):
    collector = GradientCollector(model, SketchSpec(sketch=4))
    lean = LeanPass(model, collector.modules.values())
    return check_numerics(lean, encode_examples(examples or make_examples(LENGTHS), None), collector)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Mixtral", "Gemma3"])
def test_narrow_weights_have_wide_sketches(name, dtype):
    """Rows are float32 sums of what the model computes: only its own rounding stands between them and float32's."""
    model, spec, examples = make(name).to(dtype), SketchSpec(sketch=4), make_examples(LENGTHS)
    rows = torch.cat(list(trackstar.collect_rows(model, examples, spec=spec)))
    assert rows.dtype == torch.float32
    wanted = explicit_rows(make(name).to(dtype).float(), examples, spec)
    assert relative_error(rows, wanted) < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sketches_of_narrow_factors_are_exact(dtype):
    """P_L (Σ δ xᵀ) P_Rᵀ of the very x and δ that a narrow model had, in float64, to float32's precision."""
    torch.manual_seed(0)
    model, spec, uses = make_llama().to(dtype).eval(), SketchSpec(sketch=4), []
    ids = torch.tensor([example["input_ids"] for example in make_examples((9, 9))])
    with GradientCollector(model, spec) as collector, GradientTap(spec.weights(model), uses.append):
        (model(input_ids=ids, labels=ids).loss * 16).backward()
    block_of = spec.block_of(model)
    assert len(uses) == len(block_of)
    for use in uses:
        assert use.activations.dtype == use.output_grads.dtype == dtype
        left, right = (side.double() for side in spec.projections(use.name, *reversed(use.weight.shape)))
        wanted = torch.stack(
            [(left @ (d.double().T @ x.double()) @ right.T).flatten() for x, d in use.each()]
        )
        assert relative_error(collector.rows[:, block_of[use.name]], wanted) < 1e-5


def test_float32_is_silent():
    assert check(make("Llama")) is None
    assert check(make("Mixtral")) is None
    assert check(make("Bloom")) is None  # padded
    assert check(make("CpmAnt")) is None  # one by one


def uneven():
    """A bfloat16 model whose rows depend on a batch's shape on any processor, as they do by themselves on many."""
    model = make("Llama").to(torch.bfloat16)
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: output * (1 + output.shape[-2] / 500))
    return model


def test_narrow_weights_are_warned_of_with_numbers():
    note = check(uneven())
    assert note.startswith("this model's own numerics (bfloat16) move rows, by these shares of their length")
    shares = [
        float(note.split(f"{way} ")[1].split()[0].strip(",;"))
        for way in ("padded", "packed", "in another batch")
    ]
    assert 1e-3 < max(shares) < 1


def test_examples_that_see_each_other_are_warned_of():
    """A little, so that no shortcut minds: what a layer adds depends on the whole batch."""
    model = make("Llama")
    collector = GradientCollector(model, SketchSpec(sketch=4))
    lean = LeanPass(model, collector.modules.values())
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: output + 0.1 * output.mean((0, 1)))
    assert "in another batch" in check_numerics(
        lean, encode_examples(make_examples(LENGTHS), None), collector
    )


def test_nothing_to_look_at():
    assert check(make("Llama"), [{"input_ids": [5]}]) is None


def test_a_build_warns(tmp_path, capsys, unsynced):
    store = trackstar.build_store(
        tmp_path / "store", uneven(), make_examples(LENGTHS), spec=SketchSpec(sketch=2)
    )
    assert len(store) == len(LENGTHS)
    assert "warning: this model's own numerics (bfloat16)" in " ".join(capsys.readouterr().err.split())
