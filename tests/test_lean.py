"""Lean passes: every shortcut leaves the rows as the definition has them, and none is taken where it would not."""

import pytest
import torch
import trackstar
import transformers
from conftest import FAMILIES, SIZES, VOCABULARY, explicit_rows, make_examples, make_llama, relative_error
from torch import nn
from trackstar import GradientCollector, SketchSpec
from trackstar.gradients import lean
from trackstar.gradients.examples import encode_examples
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.losses import LOSSES
from trackstar.gradients.modules import select_weights
from trackstar.gradients.tap import GradientTap
from trackstar.optimizer.second_moments import SecondMoments

TOLERANCE = 2e-4
LENGTHS = (5, 9, 17, 3, 30, 2, 12, 9)

KEPT = "the logits of the whole batch are kept"
PADDED = "batches are padded"
TRANSFORMED = f"{KEPT}: its logits are not the plain product of hidden states and output embedding"

# Families that each do something that a shortcut could get wrong, and what is skipped for them.
ODD_ONES = {
    "Gemma2": ({}, [TRANSFORMED, PADDED]),  # caps its logits and its attention scores
    "Granite": ({"logits_scaling": 3.0}, [TRANSFORMED]),
    "GptOss": ({}, [PADDED]),  # attention sinks
    "Bloom": ({"n_head": 4, "n_layer": 2}, [PADDED]),  # no position ids
    "Mistral": ({"sliding_window": 8}, []),  # packs what its window sees whole
    "Phi": ({}, []),  # an output embedding with a bias
    "OPT": ({"ffn_dim": 44, "word_embed_proj_dim": 32}, []),  # flattens its tokens; learned positions
}


def make_odd(name):
    changes, skipped = ODD_ONES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | {"head_dim": 8, "pad_token_id": None} | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval(), skipped


def lean_pass(model):
    return LeanPass(model, [weight.module for weight in select_weights(model).values()])


def collected(model, examples, **options):
    return torch.cat(list(trackstar.collect_rows(model, examples, spec=SketchSpec(sketch=4), **options)))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_common_families_take_every_shortcut(name):
    assert lean_pass(FAMILIES[name]()).skipped == []


@pytest.mark.parametrize("name", list(ODD_ONES))
def test_rows_are_right_whatever_is_skipped(name):
    model, skipped = make_odd(name)
    examples = make_examples(LENGTHS)
    found = lean_pass(model).skipped
    assert len(found) == len(skipped)
    assert all(reason.startswith(start) for reason, start in zip(found, skipped, strict=True))
    assert (
        relative_error(collected(model, examples), explicit_rows(model, examples, SketchSpec(sketch=4)))
        < TOLERANCE
    )


class Blind(nn.Module):
    """A model of nothing this library knows; the last token of a row leaks into all of it."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = (
            nn.Embedding(VOCABULARY, 8),
            nn.Linear(8, 8),
            nn.Linear(8, VOCABULARY),
        )

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache):
        return transformers.modeling_outputs.CausalLMOutput(
            logits=self.head(self.layer(self.embed(input_ids)))
        )


def test_a_model_that_is_not_of_transformers_runs_without_shortcuts():
    model = Blind()
    one = lean_pass(model)
    assert [reason.split(":")[0] for reason in one.skipped] == [KEPT, PADDED]
    batch = one.arrange(encode_examples(make_examples((3, 5)), None))
    with one, GradientCollector(model, SketchSpec(sketch=2)) as collector:
        one.run(batch)
    assert collector.rows.shape == (2, 2, 4)


def test_packed_padded_and_single_examples_give_the_same_rows(model):
    examples = make_examples(LENGTHS)
    packing, padding = lean_pass(model), lean_pass(model)
    padding._longest_packed = 0
    collector = GradientCollector(model, SketchSpec(sketch=4))
    encoded = encode_examples(examples, None)

    def rows(one, chosen):
        batch = one.arrange(chosen)
        collector.offsets = batch.offsets
        with one, collector:
            one.run(batch)
        return collector.rows

    packed, padded = rows(packing, encoded), rows(padding, encoded)
    single = torch.cat([rows(packing, [example]) for example in encoded])
    assert packing.arrange(encoded).tokens.shape == (1, sum(LENGTHS))
    assert padding.arrange(encoded).tokens.shape == (len(LENGTHS), max(LENGTHS))
    assert relative_error(packed, padded) < 1e-5
    assert relative_error(packed, single) < 1e-5


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_any_chunk_of_tokens_gives_the_same_rows(llama, chunk, monkeypatch):
    examples = make_examples(LENGTHS)
    wanted = explicit_rows(llama, examples, SketchSpec(sketch=4))
    monkeypatch.setattr(lean, "CHUNK_TOKENS", chunk)
    assert relative_error(collected(llama, examples), wanted) < TOLERANCE


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("output", list(LOSSES))
def test_rows_are_the_gradient_of_the_output_function(llama, output, chunked):
    examples = make_examples((6, 9))
    examples[0]["labels"] = [-100, -100, -100, 7, -100, 4]
    spec = SketchSpec(sketch=4)
    one = lean_pass(llama)
    if not chunked:
        one._decoder = None
    collector = GradientCollector(llama, spec)
    batch = one.arrange(encode_examples(examples, None))
    collector.offsets = batch.offsets
    with one, collector:
        one.run(batch, LOSSES[output])
    wanted = []
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        with GradientCollector(llama, spec) as autograd:
            logits, value = llama(input_ids=ids).logits[0], 0.0
            for t, label in enumerate(example.get("labels", example["input_ids"])[1:]):
                if label != -100:
                    p = logits[t].softmax(0)[label]
                    value += {"loss": -p.log(), "margin": -(p / (1 - p)).log(), "logit": -logits[t, label]}[
                        output
                    ]
            value.backward()
        wanted.append(autograd.rows)
    assert relative_error(collector.rows, torch.cat(wanted)) < TOLERANCE


@pytest.mark.parametrize("name", list(LOSSES))
def test_output_functions_are_gradients(name):
    """Against autograd of the definitions, in float64, with a logit that dwarfs the others."""
    logits = torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[2, 4] = 90.0
    logits.requires_grad_()
    labels = torch.tensor([3, 3, 5, 0, 10, 7])
    log_p = logits.log_softmax(1).gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    own = logits.gather(1, labels[:, None])[:, 0]
    value = {"loss": -log_p.sum(), "margin": (others - own).sum(), "logit": -own.sum()}[name]
    (wanted,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(
        LOSSES[name](logits.detach().float(), labels).double(), wanted, rtol=1e-5, atol=1e-6
    )


def test_the_batch_s_logits_never_exist():
    torch.manual_seed(0)
    vocabulary, lengths = 4001, (300, 400, 300)
    model = make_llama(vocab_size=vocabulary, max_position_embeddings=512)
    one = lean_pass(model)
    batch = one.arrange(encode_examples([{"input_ids": list(range(n))} for n in lengths], None))
    with torch.profiler.profile(profile_memory=True) as profile, one, GradientTap(one_weight(model), ignore):
        one.run(batch)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest == 4 * lean.CHUNK_TOKENS * vocabulary  # a chunk's logits, and nothing is larger


def test_frozen_parts_get_no_gradient(llama):
    """Neither weights, nor embeddings, nor the inputs of the first layer's captured modules."""
    one = lean_pass(llama)
    batch = one.arrange(encode_examples(make_examples((6, 9)), None))
    products = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.default:
                products.append(function)
            return function(*args, **kwargs or {})

    with one, GradientTap(select_weights(llama), ignore), Watch():
        one.run(batch)
    # 7 matrices a layer forward, as many backward but for the first layer's q, k and v, and the head twice:
    # its two products with out= are another overload.
    assert len(products) == 14 + 14 - 3
    assert all(p.grad is None for p in llama.parameters())


def one_weight(model):
    return dict(list(select_weights(model).items())[:1])


def ignore(use):
    pass


def test_the_model_is_left_as_it_was(llama):
    llama.train()
    before = llama.config._attn_implementation
    one = lean_pass(llama)
    assert (llama.config._attn_implementation, llama.training) == (before, True)
    batch = one.arrange(encode_examples(make_examples((6, 9)), None))

    def fail(use):
        raise KeyError(use.name)

    with pytest.raises(KeyError), one, GradientTap(one_weight(llama), fail):
        one.run(batch)
    assert (llama.config._attn_implementation, llama.training) == (before, True)
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())


def test_second_moments_do_not_depend_on_packing(llama):
    examples = make_examples((4, 9, 9))
    weights = select_weights(llama)
    wanted = dict.fromkeys(weights, 0.0)
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        llama.zero_grad()
        (llama(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)).backward()
        for name, weight in weights.items():
            wanted[name] = wanted[name] + weight.module.weight.grad.square() / len(examples)
    llama.zero_grad()
    for name, v in SecondMoments.estimate(llama, examples).moments.items():
        torch.testing.assert_close(v, wanted[name], rtol=1e-4, atol=1e-10)


def test_a_build_says_what_it_skips(tmp_path, capsys, unsynced):
    model, _ = make_odd("Granite")
    trackstar.build_store(tmp_path / "store", model, make_examples((5, 6)), spec=SketchSpec(sketch=2))
    assert f"slower than it could be: {TRANSFORMED}" in " ".join(capsys.readouterr().err.split())


def test_offsets_that_do_not_fit_the_pass(llama):
    collector = GradientCollector(llama, SketchSpec(sketch=2))
    collector.offsets = torch.tensor([0, 3, 7])
    ids = torch.arange(8)[None]
    with pytest.raises(RuntimeError, match="must see the 7 tokens of offsets, got 8"), collector:
        llama(input_ids=ids, labels=ids).loss.backward()
