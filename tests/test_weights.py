"""What can be captured besides whole matrices: experts, parts of fused matrices, vectors, embeddings."""

import pytest
import torch
import trackstar
import transformers
from conftest import SIZES, explicit_rows, make_examples, make_gpt2, make_llama, make_neox, relative_error
from test_families import make
from torch import nn
from torch.nn import functional
from trackstar import GradientCollector, SketchSpec
from trackstar.gradients.examples import encode_examples
from trackstar.gradients.lean import LeanPass
from trackstar.optimizer.second_moments import SecondMoments
from transformers.optimization import Adafactor

TOLERANCE = 2e-4
LENGTHS = (5, 9, 17, 3, 12)


def check(model, spec, correct=None, examples=None):
    """Rows of the lean pass and of a plain loop equal explicit backward passes."""
    examples = make_examples(LENGTHS) if examples is None else examples
    correction, scales = None, None
    if correct is not None:
        correction = SecondMoments.estimate(model, examples, spec=spec).correction(correct, rank=2)
        scales = correction.scales or {name: u.T @ v for name, (u, v) in correction.factors.items()}
    wanted = explicit_rows(model, examples, spec, scales)
    rows = torch.cat(list(trackstar.collect_rows(model, examples, spec=spec, correction=correction)))
    assert relative_error(rows, wanted) < TOLERANCE
    looped = []
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        with GradientCollector(model, spec, correction) as collector:
            (model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)).backward()
        looped.append(collector.rows)
    assert relative_error(torch.cat(looped), wanted) < TOLERANCE
    return wanted


def untied(make_model=make_llama, **changes):
    torch.manual_seed(0)
    return make_model(tie_word_embeddings=False, **changes).eval()


# Experts


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_experts_by_hand(name, implementation):
    """Each expert is named, and its gradient is that of its slice of the parameter."""
    model, spec = make(name), SketchSpec(sketch=4)
    model.set_experts_implementation(implementation)
    examples = make_examples(LENGTHS)
    rows = torch.cat(list(trackstar.collect_rows(model, examples, spec=spec)))
    block_of = spec.block_of(model)
    for i, example in enumerate(examples):
        ids = torch.tensor([example["input_ids"]])
        model.zero_grad()
        (model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)).backward()
        for layer in range(2):
            experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
            for field in ("gate_up_proj", "down_proj"):
                for expert, gradient in enumerate(experts.get_parameter(field).grad):
                    called = f"model.layers.{layer}.mlp.experts.{expert}.{field}"
                    gradient = gradient.T if name == "GptOss" else gradient
                    left, right = spec.projections(called, gradient.shape[1], gradient.shape[0])
                    wanted = (left @ gradient @ right.T).flatten()
                    assert (rows[i, block_of[called]] - wanted).norm() <= TOLERANCE * rows[i].norm()
    model.zero_grad()


def test_only_routed_tokens_count():
    """An expert that no token of an example reaches has a block of zeros in its row."""
    model, spec = make("Qwen3Moe"), SketchSpec(sketch=4)
    rows = check(model, spec)
    experts = [block for name, block in spec.block_of(model).items() if ".experts." in name]
    empty = (rows[:, experts] == 0).all(dim=2)
    assert empty.any()
    assert not empty.all(dim=0).all()


def test_a_way_to_run_experts_that_cannot_be_followed_is_named():
    model = make("Mixtral")
    model.set_experts_implementation("batched_mm")
    message = r"experts.0.gate_up_proj' \(and 15 more\) is used through '__getitem__', whose gradients are not followed"
    with pytest.raises(RuntimeError, match=message):
        list(trackstar.collect_rows(model, make_examples((5,))))


def test_routers_are_captured_when_they_are_spelled_out():
    model = make("DeepseekV3")
    everything = SketchSpec(modules=["*"]).block_of(model)
    assert not any(name.endswith("mlp.gate") for name in everything)
    spec = SketchSpec(sketch=4, modules=["*.mlp.gate", "*.experts.0.*"])
    assert [name for name in spec.block_of(model) if name.endswith("gate")] == ["model.layers.1.mlp.gate"]
    check(model, spec)


class Mixture(nn.Module):
    """Somebody's own mixture: linear layers for experts, called with the tokens that chose them."""

    def __init__(self, order):
        super().__init__()
        self.inward = nn.Linear(6, 8)
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 8)) for _ in range(3)
        )
        self.order = order

    def forward(self, x):
        h = self.inward(x)
        flat = h.view(-1, 8)
        weight, chosen = self.router(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen == number)
            if self.order == "reversed":
                tokens, place = tokens.flip(0), place.flip(0)
            if self.order == "written":
                out[tokens] = out[tokens] + expert(flat[tokens]) * weight[tokens, place, None]
            else:
                out = out.index_add(0, tokens, expert(flat[tokens]) * weight[tokens, place, None])
        return (h + out.view_as(h)).tanh()


@pytest.mark.parametrize("order", ["ascending", "reversed", "written"])
@pytest.mark.parametrize("frozen", [False, True])
def test_somebodys_own_mixture(order, frozen):
    torch.manual_seed(0)
    model, spec, inputs = Mixture(order), SketchSpec(sketch=3), torch.randn(4, 7, 6)
    wanted = torch.zeros(4, len(spec.block_of(model)), 9)
    for i, x in enumerate(inputs):
        model.zero_grad()
        model(x[None]).square().sum().backward()
        for name, block in spec.block_of(model).items():
            gradient = model.get_submodule(name).weight.grad
            if gradient is not None:
                left, right = spec.projections(name, *reversed(gradient.shape))
                wanted[i, block] = (left @ gradient @ right.T).flatten()
    model.zero_grad()
    model.requires_grad_(not frozen)
    with GradientCollector(model, spec) as collector:
        model(inputs).square().sum().backward()
    assert relative_error(collector.rows, wanted) < TOLERANCE


class Experts(nn.Module):
    """Experts in one parameter, multiplied in one of the ways that code is found to."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.w1 = nn.Parameter(torch.randn(12, 8) if way == "rows" else torch.randn(3, 4, 8))
        self.w2 = nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, flat, chosen):
        if self.way == "all at once":  # every token meets every expert, those that did not choose it as zeros
            held = flat * (torch.arange(3)[:, None] == chosen.T)[..., None]
            return torch.bmm(torch.bmm(held, self.w1.mT).tanh(), self.w2.mT).sum(0)
        out = torch.zeros_like(flat)
        for e in range(3):
            (tokens,) = torch.where(chosen[:, 0] == e)
            x = flat[tokens]
            if self.way == "rows":
                h = x.matmul(self.w1.view(3, 4, 8)[e].T)
            elif self.way == "matrix first":
                h = (self.w1[e] @ x.T).T
            elif self.way == "converted":
                h = functional.linear(x.double(), self.w1[e].double()).float()
            else:
                h = torch.addmm(torch.zeros(4), x, self.w1[e].t())
            out[tokens] = functional.linear(h.tanh(), self.w2[e])
        return out


class Routed(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.inward, self.router, self.experts = nn.Linear(6, 8), nn.Linear(8, 3), Experts(way)

    def forward(self, x):
        h = self.inward(x)
        flat = h.reshape(-1, 8)
        scores, chosen = self.router(flat).softmax(-1).topk(1, dim=-1)
        return (h + (self.experts(flat, chosen) * scores).view_as(h)).tanh()


@pytest.mark.parametrize("way", ["rows", "all at once", "matrix first", "converted", "added"])
@pytest.mark.parametrize("frozen", [False, True])
def test_somebodys_own_fused_experts(way, frozen):
    torch.manual_seed(0)
    model, spec, inputs = Routed(way), SketchSpec(sketch=3), torch.randn(4, 7, 6)
    weights, parameters = spec.weights(model), dict(model.named_parameters())
    wanted = torch.zeros(4, len(weights), 9)
    for i, x in enumerate(inputs):
        model.zero_grad()
        model(x[None]).square().sum().backward()
        for (name, block), weight in zip(spec.block_of(model).items(), weights.values(), strict=True):
            gradient = weight.view(parameters[weight.parameter].grad)
            left, right = spec.projections(name, *reversed(gradient.shape))
            wanted[i, block] = (left @ gradient @ right.T).flatten()
    model.zero_grad()
    model.requires_grad_(not frozen)
    with GradientCollector(model, spec) as collector:
        model(inputs).square().sum().backward()
    assert relative_error(collector.rows, wanted) < TOLERANCE


class Lost(nn.Module):
    """An expert whose tokens come out of a function that tells nothing of their order."""

    def __init__(self):
        super().__init__()
        self.inward, self.experts = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        flat = self.inward(x).view(-1, 4)
        return self.experts[0](flat.sort(dim=0).values[:5]).sum()


def test_tokens_whose_example_is_not_known_are_refused():
    model = Lost()
    message = r"'experts.0' multiplies a tensor of shape \(5, 4\), and it is not known"
    with pytest.raises(RuntimeError, match=message), GradientCollector(model, SketchSpec(sketch=2)):
        model(torch.randn(3, 4, 4)).backward()


# Parts of fused matrices


@pytest.mark.parametrize(
    ("make_model", "split", "names"),
    [
        (make_gpt2, {"*.c_attn": 3}, ["transformer.h.0.attn.c_attn.0", "transformer.h.0.attn.c_attn.2"]),
        (make_gpt2, {"*.c_attn": 12}, ["transformer.h.1.attn.c_attn.11"]),
        (make_neox, {"*.query_key_value": 4}, ["gpt_neox.layers.0.attention.query_key_value.3"]),
        (make_neox, {"*.query_key_value": [8, 8, 8]}, ["gpt_neox.layers.0.attention.query_key_value.2"]),
        (make_llama, {"*.k_proj": 2, "*.gate_proj": [4, 40]}, ["model.layers.0.self_attn.k_proj.1"]),
    ],
)
def test_parts_of_a_matrix_count_as_modules(make_model, split, names):
    torch.manual_seed(0)
    model, spec = make_model().eval(), SketchSpec(sketch=4, split=split)
    assert set(names) <= set(spec.block_of(model))
    check(model, spec)
    check(model, spec, correct="exact")
    check(model, spec, correct="rank")


def test_repeating_sizes_take_rows_of_every_repetition():
    """GPT-NeoX keeps query, key and value of a head together: 8 rows each here, 4 heads."""
    model = make_neox()
    spec = SketchSpec(sketch=4, split={"*.0.attention.query_key_value": [8, 8, 8]})
    weight = spec.weights(model)["gpt_neox.layers.0.attention.query_key_value.1"]
    whole = model.gpt_neox.layers[0].attention.query_key_value.weight
    assert weight.shape == (32, 32)
    assert torch.equal(weight.view(whole), whole.view(4, 3, 8, 32)[:, 1].flatten(0, 1))


def test_parts_of_experts():
    check(make("GptOss"), SketchSpec(sketch=4, modules=["*.experts.*"], split={"*.down_proj": 2}))


# Vectors, embeddings, lm_head


@pytest.mark.parametrize("correct", [None, "exact", "rank"])
@pytest.mark.parametrize(
    ("model", "also", "names"),
    [
        (
            lambda: untied(make_gpt2),
            ["biases"],
            ["transformer.h.0.attn.c_attn.bias"],
        ),
        (
            lambda: untied(make_gpt2),
            ["norms"],
            ["transformer.ln_f", "transformer.ln_f.bias"],
        ),
        (
            untied,
            ["norms"],
            ["model.norm", "model.layers.0.input_layernorm"],
        ),
        (lambda: make("Gemma3"), ["norms"], ["model.layers.0.self_attn.q_norm"]),
        (lambda: make("Qwen3"), ["norms"], ["model.layers.0.self_attn.k_norm"]),
        (untied, ["embeddings"], ["model.embed_tokens"]),
        (lambda: untied(pad_token_id=3), ["embeddings"], ["model.embed_tokens"]),
        (untied, ["lm_head"], ["lm_head"]),
        (lambda: make("Phi"), ["lm_head", "biases"], ["lm_head", "lm_head.bias"]),
        (lambda: make("GptOss"), ["biases"], ["model.layers.0.mlp.experts.2.gate_up_proj_bias"]),
    ],
)
def test_what_is_off_by_default(model, also, names, correct):
    model = model()
    assert not set(names) & set(SketchSpec().block_of(model))
    spec = SketchSpec(sketch=4, also=also)
    assert set(names) <= set(spec.block_of(model))
    check(model, spec, correct)


def test_an_embedding_that_scales_its_output_is_seen_inside():
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        **SIZES | {"head_dim": 8, "pad_token_id": 0, "tie_word_embeddings": False}
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    check(model, SketchSpec(sketch=4, also=["embeddings"]))


def test_position_embeddings_of_packed_examples():
    model = untied(make_gpt2)
    spec = SketchSpec(sketch=4, modules=["*wpe", "*.c_fc"], also=["embeddings"])
    check(model, spec)


def test_position_embeddings_of_padded_examples():
    """The model's own positions are one row for the whole batch, whose gradient would be that of all its examples."""
    model = untied(make_gpt2)
    spec = SketchSpec(sketch=4, modules=["*wpe", "*.c_fc"], also=["embeddings"])
    collector = GradientCollector(model, spec)
    lean = LeanPass(model, collector.modules.values())
    encoded = encode_examples(make_examples(LENGTHS), None)
    batch = lean.arrange(encoded, packed=False)
    collector.offsets, collector.shape = batch.offsets, batch.shape
    with collector, lean:
        lean.run(batch)
    assert relative_error(collector.rows, check(model, spec)) < TOLERANCE


def test_tied_embeddings_share_a_gradient():
    """What is captured of the input and of the output embedding sums to the gradient of the weight that they share."""
    torch.manual_seed(0)
    model, spec = make_llama().eval(), SketchSpec(sketch=97, also=["embeddings", "lm_head"])
    examples, parts = make_examples((9,)), 0.0
    block_of = spec.block_of(model)
    (row,) = torch.cat(list(trackstar.collect_rows(model, examples, spec=spec)))
    for name, shape in (("model.embed_tokens", (32, 97)), ("lm_head", (97, 32))):
        left, right = (side.double() for side in spec.projections(name, shape[1], shape[0]))
        gradient = (
            torch.linalg.pinv(left) @ row[block_of[name]].view(97, 97).double() @ torch.linalg.pinv(right).T
        )
        parts = parts + (gradient.T if name == "model.embed_tokens" else gradient)
    ids = torch.tensor([examples[0]["input_ids"]])
    (model(input_ids=ids, labels=ids).loss * 8).backward()
    torch.testing.assert_close(parts.float(), model.lm_head.weight.grad, rtol=1e-3, atol=1e-4)


def test_no_table_is_ever_formed():
    """Capturing an embedding costs no matrix of its size, nor one-hot inputs."""
    torch.manual_seed(0)
    vocabulary, features = 30_011, 64
    embedding = nn.Embedding(vocabulary, features).requires_grad_(False)
    model = nn.Sequential(embedding, nn.Linear(features, 8))
    spec = SketchSpec(sketch=2, also=["embeddings"])
    collector = GradientCollector(model, spec)
    ids = torch.randint(0, vocabulary, (4, 16))
    with torch.profiler.profile(profile_memory=True) as profile, collector:
        model(ids).square().sum().backward()
    assert collector.rows.shape == (4, 2, 4)
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 4 * 16 * vocabulary


def test_vectors_are_projected_from_one_side():
    spec = SketchSpec(sketch=8)
    projection = spec.vector_projection("norm", 2000).double()
    assert projection.shape == (64, 2000)
    assert projection.square().mean().item() == pytest.approx(1 / 64)
    vector = torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (projection @ vector).norm().item() == pytest.approx(vector.norm().item(), rel=0.3)


# Patterns


def test_patterns_that_leave_out(llama):
    names = list(SketchSpec(modules=["!*.q_proj", "!*.1.*"]).block_of(llama))
    assert names == [n for n in SketchSpec().block_of(llama) if "q_proj" not in n and ".1." not in n]
    assert list(SketchSpec(modules=["*.mlp.*", "!*.down_proj"]).block_of(llama)) == [
        f"model.layers.{layer}.mlp.{which}_proj" for layer in range(2) for which in ("gate", "up")
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"modules": ["!*.nothing"]},
            r"pattern '!\*.nothing' must match a matrix that can be captured, matched none",
        ),
        ({"modules": ["!*_proj"]}, "modules must leave something to capture"),
        (
            {"modules": ["*.input_layernorm"]},
            r"only 'model.layers.0.input_layernorm', which takes also=\('norms',\)",
        ),
        (
            {"also": ["biases"]},
            "also: 'biases' must be among what is captured of LlamaForCausalLM, found none",
        ),
        (
            {"split": {"*.qkv": 3}},
            r"split: pattern '\*.qkv' must match a matrix that is captured, matched none",
        ),
        ({"split": {"*.q_proj": 5}}, "split: 5 must divide the 32 rows of 'model.layers.0.self_attn.q_proj'"),
        ({"split": {"*.q_proj": [8, 9]}}, r"split: \[8, 9\] must divide the 32 rows of"),
    ],
)
def test_specs_that_do_not_fit_the_model(llama, spec, message):
    with pytest.raises(ValueError, match=message):
        GradientCollector(llama, SketchSpec(**spec))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"also": ["bias"]}, "also must be a list of any of embeddings, lm_head, biases, norms; got"),
        ({"also": "norms"}, "also must be a list"),
        ({"split": {"*": 0}}, r"split of '\*' must be a number of parts or a list of their rows, got 0"),
        ({"split": {"*": []}}, r"split of '\*' must be a number of parts or a list of their rows, got \[\]"),
    ],
)
def test_bad_specs(fields, message):
    with pytest.raises(ValueError, match=message):
        SketchSpec(**fields)


def test_a_spec_survives_json(llama):
    spec = SketchSpec(sketch=4, modules=("*.mlp.*",), also=("norms",), split={"*.up_proj": (22, 22)})
    assert SketchSpec(**spec.as_dict()) == spec


# Second moments of a trained model


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "torch's Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "transformers' Adafactor": lambda parameters: Adafactor(
        parameters, lr=1e-2, relative_step=False, scale_parameter=False
    ),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("tied", [True, False])
def test_an_optimizer_s_moments_of_every_kind(name, tied):
    """A weight's V is its part of its parameter's: experts, parts of fused matrices, vectors, embeddings."""
    torch.manual_seed(0)
    model = make("GptOss") if not tied else make_llama()
    spec = SketchSpec(
        sketch=4,
        also=["embeddings", "norms", "lm_head"] + ["biases"] * (not tied),
        split={"*.q_proj": 4, "*.k_proj": [2, 2]},
    )
    optimizer = OPTIMIZERS[name](model.parameters())
    ids = torch.tensor([example["input_ids"] for example in make_examples((12, 12, 12))])
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    second = SecondMoments.from_optimizer(optimizer.state_dict(), model, spec=spec)
    assert second.source == ("optimizer:adam" if name == "adam" else "optimizer:adafactor")
    assert set(second.moments) == set(spec.weights(model))
    for weight in spec.weights(model).values():
        state = optimizer.state[weight.module.get_parameter(weight.field)]
        if "exp_avg_sq" in state:
            v = state["exp_avg_sq"] / (1 - 0.999**2 if name == "adam" else 1)
        elif "exp_avg_sq_row" in state:
            row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            v = row[..., None] * col[..., None, :] / row.mean(-1)[..., None, None]
        elif "variance" in state:
            v = state["variance"]
        else:
            v = state["row_var"] * state["col_var"] / state["row_var"].mean(-2, keepdim=True)
        moment = second.moments[weight.name]
        if isinstance(moment, tuple):
            moment = torch.outer(*moment) / moment[1 if weight.transposed else 0].mean()
        torch.testing.assert_close(moment, weight.view(v), rtol=1e-4, atol=0)


def test_a_rank_correction_takes_vectors_as_they_are():
    model = untied()
    spec = SketchSpec(sketch=4, also=["norms"])
    second = SecondMoments.estimate(model, make_examples(LENGTHS), spec=spec)
    u, v = second.correction("rank", rank=3).factors["model.norm"]
    assert (u.shape, v.shape) == ((1, 32), (1, 1))
    assert torch.equal(u.T @ v, second.correction("exact").scales["model.norm"])
