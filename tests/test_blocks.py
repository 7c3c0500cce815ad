"""Grouping of weights into blocks."""

import json

import pytest
import torch
import trackstar
from conftest import FAMILIES, explicit_rows, make_examples, make_llama, relative_error
from hypothesis import given
from hypothesis import strategies as st
from trackstar import SketchSpec
from trackstar.gradients.blocks import group_weights, is_attention, number_blocks


def names_of(layers, *, outside=False):
    inner = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    names = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in inner]
    return ["model.embed_tokens", *names, "model.norm", "lm_head"] if outside else names


@given(st.integers(1, 13), st.data(), st.booleans())
def test_layer_blocks_are_contiguous_and_keep_attention_and_mlp_apart(layers, data, outside):
    n = data.draw(st.integers(2, 2 * layers))
    names = names_of(layers, outside=outside)
    grouped = group_weights(names, n)
    assert list(grouped) == names
    assert len(set(grouped.values())) == n
    members = {}
    for name, block in grouped.items():
        members.setdefault(block, []).append(name)
    sizes = {True: [], False: []}
    for block, inside in members.items():
        (attention,) = {is_attention(name) for name in inside}
        assert block.endswith(" attention" if attention else " MLP")
        held = sorted({int(name.split(".")[2]) for name in inside if name.startswith("model.layers")})
        assert held == list(range(held[0], held[-1] + 1))
        sizes[attention].append(len(held))
    assert len(sizes[True]) == n // 2
    assert all(max(s) - min(s) <= 1 for s in sizes.values())
    # Numbered in the order of the model.
    assert list(dict.fromkeys(number_blocks(grouped).values())) == list(range(n))


def test_blocks_are_named():
    assert list(dict.fromkeys(group_weights(names_of(4, outside=True), 4).values())) == [
        "model.layers.0–1 MLP",
        "model.layers.0–1 attention",
        "model.layers.2–3 attention",
        "model.layers.2–3 MLP",
    ]
    assert set(group_weights(names_of(2), 1).values()) == {
        "model.layers.0.self_attn.q_proj – model.layers.1.mlp.down_proj"
    }
    assert list(group_weights(["0", "2", "4"], 2).values()) == ["0–2", "0–2", "4"]
    llama = make_llama()
    assert SketchSpec().block_names(llama) == tuple(SketchSpec().block_of(llama))


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_family_has_attention_and_mlp_apart(family, n):
    model = FAMILIES[family]()
    spec = SketchSpec(blocks=n, also=["norms", "embeddings"])
    names = spec.block_names(model)
    for name, block in spec.block_of(model).items():
        assert names[block].endswith("attention" if is_attention(name) else "MLP")
    assert not is_attention("model.layers.0.post_attention_layernorm")
    assert is_attention("model.layers.0.self_attn.q_norm")


OWN = {"*.self_attn.[qk]_proj": "matching", "*.self_attn.[vo]_proj": "moving", "*.mlp.*": "MLPs"}


def test_rows_of_a_grouping_of_ones_own(llama, tmp_path):
    spec = SketchSpec(sketch=4, blocks=OWN)
    assert spec.block_names(llama) == ("matching", "moving", "MLPs")
    examples = make_examples((5, 9, 12))
    rows = torch.cat(list(trackstar.collect_rows(llama, examples, spec=spec)))
    by_module = explicit_rows(llama, examples, SketchSpec(sketch=4))
    wanted = torch.zeros(3, 3, 16, dtype=torch.float64)
    for module, (name, block) in enumerate(spec.block_of(llama).items()):
        group = 2 if "mlp" in name else int(name.split(".")[-1][0] in "vo")
        assert block == group
        wanted[:, group] += by_module[:, module]
    assert relative_error(rows, wanted) < 2e-4
    # The store keeps it, in any order.
    store = trackstar.build_store(tmp_path / "s", llama, examples, spec=spec)
    assert store.spec == trackstar.open_store(tmp_path / "s").spec == spec
    reordered = SketchSpec(sketch=4, blocks=dict(reversed(OWN.items())))
    assert reordered.block_of(llama) == spec.block_of(llama)
    trackstar.build_store(tmp_path / "s", llama, examples, spec=reordered)
    other = SketchSpec(sketch=4, blocks=OWN | {"*.mlp.*": "others"})
    with pytest.raises(trackstar.StoreError, match="spec"):
        trackstar.build_store(tmp_path / "s", llama, examples, spec=other)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            {"*.mlp.*": "a"},
            "blocks must put 'model.layers.0.self_attn.q_proj' into one group, it matches none",
        ),
        (
            {"*": "a", "*.1.*": "b"},
            r"'model.layers.1.self_attn.q_proj' into one group, it matches '\*' \('a'\), ",
        ),
        ({"*": "a", "*.9.*": "a"}, r"blocks: pattern '\*.9.\*' must match something that is captured"),
        (5, "blocks must be at most 4 for this model's 14 modules, got 5"),
        ({}, "blocks must map patterns to names of groups"),
        ({"*": 1}, "blocks must map patterns to names of groups"),
        ([4], 'blocks must be "module" or an int of at least 1, or map patterns to groups; got'),
        (True, "blocks must be"),
    ],
)
def test_bad_groupings(llama, blocks, message):
    with pytest.raises(ValueError, match=message):
        SketchSpec(blocks=blocks).block_of(llama)


def test_the_command_line_reads_a_grouping(tmp_path):
    from trackstar.commands.options import SketchKind, make_spec

    file = tmp_path / "blocks.json"
    file.write_text(json.dumps(OWN))
    assert make_spec(4, str(file), SketchKind.rademacher).blocks == OWN
    file.write_text("{")
    with pytest.raises(ValueError, match=r"--blocks: .* is not JSON"):
        make_spec(4, str(file), SketchKind.rademacher)
