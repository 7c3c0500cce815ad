import pytest
import torch
import trackstar
from conftest import explicit_rows, make_examples, make_llama, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint
from trackstar import GradientCollector, SketchSpec
from trackstar.optimizer.second_moments import SecondMoments

from trackstar_kernels.sketch import KINDS

TOLERANCE = 2e-4
"""Relative error of a float32 row against its float64 definition, as promised to users."""

LENGTHS = (5, 9, 17, 3, 30, 2, 12)


def collected(model, examples, spec, correction=None):
    return torch.cat(list(trackstar.collect_rows(model, examples, spec=spec, correction=correction)))


@pytest.mark.parametrize("blocks", ["module", 2, 1, 3])
def test_rows_equal_explicit_backward_passes(model, blocks):
    spec = SketchSpec(sketch=4, blocks=blocks, seed=3)
    examples = make_examples(LENGTHS)
    rows = collected(model, examples, spec)
    assert rows.dtype == torch.float32
    assert relative_error(rows, explicit_rows(model, examples, spec)) < TOLERANCE


@pytest.mark.parametrize("sketch", KINDS)
@pytest.mark.parametrize("kind", ["exact", "rank"])
def test_corrected_rows_equal_explicit_backward_passes(model, kind, sketch):
    spec = SketchSpec(sketch=4, kind=sketch)
    examples = make_examples(LENGTHS)
    correction = SecondMoments.estimate(model, examples).correction(kind, rank=2)
    if kind == "exact":
        scales = correction.scales
    else:
        scales = {name: u.T @ v for name, (u, v) in correction.factors.items()}
    rows = collected(model, examples, spec, correction)
    assert relative_error(rows, explicit_rows(model, examples, spec, scales)) < TOLERANCE


def test_a_batch_of_somebody_elses_loop(model):
    """A mean-free loss over a dict batch: rows are per example, and .grad is what it would be anyway."""
    examples = make_examples((11, 11, 11))
    batch = {"input_ids": torch.tensor([example["input_ids"] for example in examples])}
    batch["labels"] = batch["input_ids"]
    model.zero_grad()
    loss = model(**batch).loss * 3 * 10
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    spec = SketchSpec(sketch=4)
    with GradientCollector(model, spec) as collector:
        (model(**batch).loss * 3 * 10).backward()
    assert relative_error(collector.rows, explicit_rows_keeping_grads(model, examples, spec)) < TOLERANCE
    for name, gradient in plain.items():
        assert torch.equal(gradient, dict(model.named_parameters())[name].grad), name


def explicit_rows_keeping_grads(model, examples, spec):
    kept = {name: p.grad for name, p in model.named_parameters()}
    rows = explicit_rows(model, examples, spec)
    for name, p in model.named_parameters():
        p.grad = kept[name]
    return rows


def test_padding_and_batch_composition_do_not_change_a_row(model):
    spec = SketchSpec(sketch=4)
    examples = make_examples((4, 9, 9, 20, 33))
    together = collected(model, examples, spec)
    for i, example in enumerate(examples):
        assert relative_error(collected(model, [example], spec), together[i : i + 1]) < 1e-5


@pytest.mark.parametrize(
    "example",
    [{"input_ids": []}, {"input_ids": [5]}, {"input_ids": [5, 6, 7], "labels": [-100] * 3}],
    ids=["empty", "one token", "all masked"],
)
def test_an_example_without_a_loss_has_a_row_of_zeros(llama, example):
    spec = SketchSpec(sketch=4)
    others = make_examples((6, 8))
    rows = collected(llama, [others[0], example, others[1]], spec)
    assert not rows[1].any()
    assert relative_error(rows[[0, 2]], explicit_rows(llama, others, spec)) < TOLERANCE
    assert not collected(llama, [example], spec).any()


class Twice(nn.Module):
    """One linear layer applied twice, an MLP beside it, no tokens."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def per_example_gradients(model, inputs, loss):
    rows = []
    for x in inputs:
        model.zero_grad()
        loss(model(x[None])).backward()
        rows.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    return rows


@pytest.mark.parametrize("recompute", ["none", "reentrant", "non-reentrant"])
def test_a_module_that_runs_twice_adds_up(recompute):
    torch.manual_seed(0)
    model = Twice()
    inputs = torch.randn(4, 6, requires_grad=True)
    spec = SketchSpec(sketch=3)

    def run(x):
        if recompute == "none":
            return model(x)
        return checkpoint(model, x, use_reentrant=recompute == "reentrant")

    with GradientCollector(model, spec) as collector:
        run(inputs).square().sum().backward()
    gradients = per_example_gradients(model, inputs.detach(), lambda y: y.square().sum())
    for name, block in spec.block_of(model).items():
        left, right = spec.projections(name, *reversed(model.get_submodule(name).weight.shape))
        wanted = torch.stack([(left @ g[f"{name}.weight"] @ right.T).flatten() for g in gradients])
        assert relative_error(collector.rows[:, block], wanted) < TOLERANCE


def test_frozen_weights_are_captured_and_get_no_gradient(llama):
    examples = make_examples((7, 7))
    spec = SketchSpec(sketch=4)
    wanted = explicit_rows(llama, examples, spec)
    llama.requires_grad_(False)
    ids = torch.tensor([example["input_ids"] for example in examples])
    with GradientCollector(llama, spec) as collector:
        (llama(input_ids=ids, labels=ids).loss * 2 * 6).backward()
    assert relative_error(collector.rows, wanted) < TOLERANCE
    assert all(p.grad is None for p in llama.parameters())


def test_passes_of_gradient_accumulation_follow_each_other(llama):
    spec = SketchSpec(sketch=4)
    first, second = make_examples((7, 7)), make_examples((9,), seed=1)
    with GradientCollector(llama, spec) as collector:
        for part in (first, second):
            ids = torch.tensor([example["input_ids"] for example in part])
            (llama(input_ids=ids, labels=ids).loss * ids.shape[0] * (ids.shape[1] - 1)).backward()
    assert relative_error(collector.rows, explicit_rows(llama, [*first, *second], spec)) < TOLERANCE


def test_evaluation_inside_the_block_is_not_captured(llama):
    ids = torch.tensor([[1, 2, 3, 4]])
    with GradientCollector(llama, SketchSpec(sketch=4)) as collector:
        (llama(input_ids=ids, labels=ids).loss * 3).backward()
        with torch.no_grad():
            llama(input_ids=ids.repeat(5, 1))
    assert collector.rows.shape[0] == 1


def test_hooks_are_gone_after_the_block_whatever_happens(llama):
    def hooks():
        return sum(len(module._forward_hooks) for module in llama.modules())

    before = hooks()
    with pytest.raises(KeyError), GradientCollector(llama, SketchSpec(sketch=4)):
        raise KeyError
    assert hooks() == before


def test_collecting_leaves_the_model_as_it_was(llama):
    llama.train()
    llama.lm_head.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in llama.named_parameters()}
    collected(llama, make_examples((5,)), SketchSpec(sketch=4))
    assert llama.training
    assert {name: p.requires_grad for name, p in llama.named_parameters()} == wanted
    assert all(p.grad is None for p in llama.parameters())


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_a_module_that_did_not_run_is_named():
    model = Unused()
    with GradientCollector(model, SketchSpec(sketch=2)) as collector:
        model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="'spare' did not run; leave it out"):
        _ = collector.rows


def test_a_module_that_the_loss_does_not_reach_is_named():
    model = Unused()
    x = torch.randn(2, 4)
    with GradientCollector(model, SketchSpec(sketch=2)) as collector:
        model.spare(x)
        model(x).sum().backward()
    with pytest.raises(RuntimeError, match="'spare' took part in the forward pass but received no gradient"):
        _ = collector.rows


def test_a_forward_pass_outside_the_block(llama):
    ids = torch.tensor([[1, 2, 3]])
    loss = llama(input_ids=ids, labels=ids).loss
    with GradientCollector(llama, SketchSpec(sketch=4)) as collector:
        loss.backward()
    with pytest.raises(RuntimeError, match="the forward pass belongs there too"):
        _ = collector.rows


def test_an_input_overwritten_in_place_is_refused():
    layer = nn.Linear(4, 4).requires_grad_(False)
    x = torch.randn(2, 4)
    with (
        pytest.raises(RuntimeError, match="the input of module '0' was overwritten in place"),
        GradientCollector(nn.Sequential(layer), SketchSpec(sketch=2)),
    ):
        y = layer(x)
        x.zero_()
        y.sum().backward()


class Flattened(nn.Module):
    """The second layer sees all tokens in one dimension, as some models' do, or twice as many examples."""

    def __init__(self, twice=False):
        super().__init__()
        self.one, self.two, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), twice

    def forward(self, x):
        y = self.one(x)
        return self.two(torch.cat([y, y]) if self.twice else y.flatten(0, 1)).tanh()


def test_tokens_in_one_dimension_are_told_apart():
    torch.manual_seed(0)
    model, inputs, spec = Flattened(), torch.randn(2, 3, 4), SketchSpec(sketch=2)
    with GradientCollector(model, spec) as collector:
        model(inputs).square().sum().backward()
    gradients = per_example_gradients(model, inputs, lambda y: y.square().sum())
    for name, block in spec.block_of(model).items():
        left, right = spec.projections(name, 4, 4)
        wanted = torch.stack([(left @ g[f"{name}.weight"] @ right.T).flatten() for g in gradients])
        assert relative_error(collector.rows[:, block], wanted) < TOLERANCE


def test_batches_that_differ_between_modules_are_refused():
    model = Flattened(twice=True)
    with (
        pytest.raises(RuntimeError, match=r"must see the same batch as the others, 4 examples; it saw 2"),
        GradientCollector(model, SketchSpec(sketch=2)),
    ):
        model(torch.randn(2, 3, 4)).sum().backward()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            SketchSpec(modules=["nothing.*"]),
            "pattern 'nothing.*' must match a matrix that can be captured, matched none",
        ),
        (
            SketchSpec(modules=["*embed_tokens"]),
            "matched only 'model.embed_tokens', which takes also=\\('embeddings',\\)",
        ),
        (SketchSpec(blocks=64), "blocks must be at most 4 for this model's 14 modules, got 64"),
    ],
)
def test_specs_that_do_not_fit_the_model(llama, spec, message):
    with pytest.raises(ValueError, match=message):
        GradientCollector(llama, spec)


def test_a_model_without_linear_layers():
    with pytest.raises(ValueError, match="model must have linear layers to attribute; Conv2d has none"):
        GradientCollector(nn.Conv2d(1, 1, 1))


def test_a_correction_of_another_model(llama):
    correction = SecondMoments.estimate(llama, make_examples((9, 9))).correction("exact")
    with pytest.raises(
        ValueError, match=r"correction of 'model.layers.0.mlp.gate_proj' must have shape \(40, 32\)"
    ):
        GradientCollector(make_llama(intermediate_size=40), correction=correction)
    with pytest.raises(ValueError, match=r"nothing for 'model.layers.2"):
        GradientCollector(make_llama(num_hidden_layers=3), correction=correction)


def test_lm_head_can_be_switched_on(llama):
    untied = make_llama(tie_word_embeddings=False)
    spec = SketchSpec(sketch=4, modules=["lm_head", "*.mlp.*"])
    examples = make_examples(LENGTHS)
    assert list(spec.block_of(untied))[-1] == "lm_head"
    assert (
        relative_error(collected(untied, examples, spec), explicit_rows(untied, examples, spec)) < TOLERANCE
    )


def test_no_full_gradient_is_ever_kept():
    """Peak memory of capture grows with activations, not with examples × O × I."""
    torch.manual_seed(0)
    size, batch = 512, 64
    model = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size)).requires_grad_(False)
    with (
        torch.profiler.profile(profile_memory=True) as profile,
        GradientCollector(model, SketchSpec(sketch=4)) as collector,
    ):
        model(torch.randn(batch, 8, size)).square().sum().backward()
    assert collector.rows.shape == (batch, 2, 16)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < batch * size * size


@pytest.mark.parametrize("name", ["llama", "neox", "gpt2"])
def test_default_modules_are_all_attention_and_mlp_matrices(name):
    from conftest import FAMILIES

    names = list(SketchSpec().block_of(FAMILIES[name]()))
    assert len(names) == {"llama": 14, "neox": 8, "gpt2": 8}[name]
    assert not any(part in n for n in names for part in ("lm_head", "embed", "wte", "norm"))


def test_layer_blocks_keep_attention_and_mlp_apart(llama):
    block_of = SketchSpec(blocks=4).block_of(llama)
    assert block_of["model.layers.0.self_attn.q_proj"] == 0
    assert block_of["model.layers.0.mlp.down_proj"] == 1
    assert block_of["model.layers.1.self_attn.o_proj"] == 2
    assert block_of["model.layers.1.mlp.up_proj"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_countsketch_is_for_the_left_alone(kind):
    left, right = SketchSpec(sketch=4, kind=kind).projections("layer", 30, 20)
    assert left.shape == (4, 20)
    assert right.shape == (4, 30)
    assert ((left != 0).sum(0) == (1 if kind == "countsketch" else 4)).all()
    assert ((right != 0).sum(0) == 4).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sketch": 0}, "sketch must be an int of at least 1, got 0"),
        ({"seed": -1}, "seed must be an int from 0"),
        ({"blocks": "layer"}, 'blocks must be "module" or an int of at least 1'),
        ({"kind": "sparse"}, "kind must be one of rademacher, gaussian, countsketch; got 'sparse'"),
        ({"modules": "mlp"}, "modules must be None or a list"),
    ],
)
def test_bad_specs(fields, message):
    with pytest.raises(ValueError, match=message):
        SketchSpec(**fields)
