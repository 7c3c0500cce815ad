"""Queries with one target, several, or one rather than another, against autograd of their definition in float64."""

import copy
import json

import pytest
import torch
from conftest import VOCABULARY, make_examples, make_llama, project, relative_error
from trackstar import SketchSpec, attribute, build_store
from trackstar.ekfac import fit_factors, influence
from trackstar.gradients.examples import IGNORED, encode_queries
from trackstar.gradients.losses import LOSSES, VALUES
from trackstar.scoring.attribution import query_rows

pytestmark = pytest.mark.usefixtures("unsynced")


class Tokenizer:
    """A token for each word, which is its number; a 1 comes first where special tokens are wanted."""

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        return {"input_ids": [1] * add_special_tokens + [int(word) for word in text.split()]}

    def decode(self, ids):
        return " ".join(map(str, ids))


def sequence(prompt, target):
    return {"input_ids": [*prompt, *target], "labels": [IGNORED] * len(prompt) + target}


# (query, its targets, what was not said), each a sequence of its own.
QUERIES = [
    ({"prompt": "3 8", "target": " 15 4"}, [([1, 3, 8], [15, 4])], []),
    (
        {"prompt": "3 8", "targets": [" 15 4", " 7", " 20 21 22"]},
        [([1, 3, 8], [15, 4]), ([1, 3, 8], [7]), ([1, 3, 8], [20, 21, 22])],
        [],
    ),
    ({"prompt": "40", "target": " 9", "rather_than": " 10"}, [([1, 40], [9])], [([1, 40], [10])]),
    (
        {"prompt": "40", "targets": [" 9", " 8 8"], "rather_than": [" 10 11", " 12"]},
        [([1, 40], [9]), ([1, 40], [8, 8])],
        [([1, 40], [10, 11]), ([1, 40], [12])],
    ),
    (
        sequence([5, 6], [7]) | {"rather_than": [sequence([5, 60], [7, 8])]},
        [([5, 6], [7])],
        [([5, 60], [7, 8])],
    ),
]


def value(model, prompt, target, output):
    """The paper's Table A.3, summed over the target's tokens."""
    logits = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
    p = logits.softmax(1)[range(len(target)), target]
    own = logits[range(len(target)), target]
    return {"loss": -p.log(), "margin": -(p / (1 - p)).log(), "logit": -own}[output].sum()


def softmin(values):
    return -torch.stack(values).neg().logsumexp(0)


def function_of(model, said, unsaid, output):
    f = softmin([value(model, *pair, output) for pair in said])
    return f - softmin([value(model, *pair, output) for pair in unsaid]) if unsaid else f


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    model = make_llama().eval()
    # Far from uniform, so that targets differ in probability.
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(40)
    examples = make_examples((torch.arange(30) % 9 + 4).tolist())
    path = tmp_path_factory.mktemp("queries") / "store"
    return model, examples, build_store(path, model, examples, spec=SketchSpec(sketch=4), dtype="float32")


def gradients_of(model, said, unsaid, output):
    """{parameter: gradient} of a query's function, in float64."""
    precise = copy.deepcopy(model).double()
    function_of(precise, said, unsaid, output).backward()
    return {name: p.grad for name, p in precise.named_parameters()}


@pytest.mark.parametrize("output", list(LOSSES))
@pytest.mark.parametrize("chunked", [True, False])
def test_rows_are_the_gradient_of_the_querys_function(made, output, chunked, monkeypatch):
    model, _, store = made
    if not chunked:
        monkeypatch.setattr("trackstar.gradients.lean.LeanPass._find_decoder", lambda self: None)
        monkeypatch.setattr("trackstar.gradients.lean.LeanPass._find_longest_packed", lambda self: 0)
    rows = query_rows(store, model, encode_queries([q for q, _, _ in QUERIES], Tokenizer()), output=output)
    wanted = torch.zeros(len(QUERIES), *rows.shape[1:], dtype=torch.float64)
    weights, block_of = store.spec.weights(model), store.spec.block_of(model)
    for i, (_, said, unsaid) in enumerate(QUERIES):
        gradients = gradients_of(model, said, unsaid, output)
        for name, weight in weights.items():
            wanted[i, block_of[name]] = project(store.spec, weight, gradients[weight.parameter]).flatten()
    assert relative_error(rows, wanted) < 2e-4


@pytest.mark.parametrize("name", list(LOSSES))
def test_values_are_those_whose_gradients_are_used(name):
    logits = torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 3, 5, 0, 10, 7])
    logits.requires_grad_()
    VALUES[name](logits, labels).sum().backward()
    gradient = LOSSES[name](logits.detach().clone(), labels)
    torch.testing.assert_close(gradient, logits.grad)
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    own = logits.gather(1, labels[:, None])[:, 0]
    wanted = {"loss": -p.log(), "margin": -(p / (1 - p)).log(), "logit": -own}[name]
    torch.testing.assert_close(VALUES[name](logits, labels), wanted)


def test_a_target_that_is_surely_said_decides_the_gradient(made):
    """Of two alternatives, and an alternative given twice is the same as once."""
    model, _, store = made
    prompt = [1, 3, 8]
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
        worst = int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmin())
    queries = [
        {"prompt": "3 8", "target": f" {best}"},
        {"prompt": "3 8", "targets": [f" {worst}", f" {best}"]},
        {"prompt": "3 8", "targets": [f" {best}", f" {best}"]},
        {"prompt": "3 8", "target": f" {best}", "rather_than": f" {best}"},
    ]
    one, two, twice, itself = query_rows(store, model, encode_queries(queries, Tokenizer()))
    assert relative_error(two[None], one[None]) < 0.01
    torch.testing.assert_close(twice, one, rtol=1e-4, atol=1e-6)
    assert not itself.any()


def test_completions_are_one_text_with_several_targets():
    (query,) = encode_queries(
        [{"completions": [{"prompt": "3 8", "target": " 15"}, {"prompt": " 4", "target": " 7 9"}]}],
        Tokenizer(),
    )
    assert query.tokens.tolist() == [1, 3, 8, 15, 4, 7, 9]
    assert query.labels.tolist() == [IGNORED, IGNORED, IGNORED, 15, IGNORED, 7, 9]
    assert (query.prompt, query.target, query.text) == ("3 8 15 4", " 7 9", "3 8 15 4 7 9")
    assert query.sequences == (query,)


def test_answers_say_what_was_asked(made, tmp_path):
    model, _, store = made
    queries = [{"id": str(i)} | query for i, (query, _, _) in enumerate(QUERIES)]
    result = attribute(
        store, model, queries, tokenizer=Tokenizer(), k=3, mixing=0.5, by_block=True, by_token=True
    )
    assert (result.by_block.sum(2) - result.scores).abs().max() < 1e-5
    sums = torch.stack([torch.stack([part.sum() for part in parts]) for parts in result.by_token])
    assert (sums - result.scores).abs().max() < 1e-4
    result.to_jsonl(tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["targets_plaintext"] for line in lines] == [
        " 15 4",
        "15 4 | 7 | 20 21 22",
        " 9, rather than 10",
        "9 | 8 8, rather than 10 11 | 12",
        "7, rather than 7 8",
    ]
    assert [line["inputs_plaintext"] for line in lines] == ["3 8", "3 8", "40", "40", "5 6"]
    assert result.queries[3].text == "40 9 8 8"


def test_contrasting_turns_proponents_into_opponents(made):
    model, _, store = made
    queries = [
        {"prompt": "40", "target": a, "rather_than": b} for a, b in ((" 9", " 10 11"), (" 10 11", " 9"))
    ]
    result = attribute(store, model, queries, tokenizer=Tokenizer(), k=5, mixing=0.5, opponents=True)
    torch.testing.assert_close(result.scores[0], -result.opponents.scores[1], rtol=0, atol=1e-5)
    assert torch.equal(result.indices[0], result.opponents.indices[1])


@pytest.mark.parametrize("output", ["loss", "margin"])
def test_influence_functions_take_the_same_queries(made, tmp_path, output):
    """With damping so large that (G + λI)⁻¹ is a multiple of I, influences are products of gradients."""
    model, examples, _ = made
    factors = fit_factors(tmp_path / "f", model, examples, sample=8)
    given = {"tokenizer": Tokenizer(), "k": 30, "output": output, "damping": 1e9}
    result = influence(factors, model, examples, [q for q, _, _ in QUERIES], **given)
    shortlisted = influence(
        factors, model, examples, [q for q, _, _ in QUERIES], **given | {"rescored": 1, "k": 1}
    )
    assert torch.equal(shortlisted.indices[:, 0], result.indices[:, 0])
    weights = SketchSpec().weights(model)
    training = [gradients_of(model, [(e["input_ids"][:1], e["input_ids"][1:])], [], "loss") for e in examples]
    for q, (_, said, unsaid) in enumerate(QUERIES):
        gradients = gradients_of(model, said, unsaid, output)
        wanted = torch.zeros(30, dtype=torch.float64)
        for name, weight in weights.items():
            damping = 1e9 * factors.eigenvalues(name).double().mean()
            for m, example in enumerate(training):
                wanted[m] += (gradients[weight.parameter] * example[weight.parameter]).sum() / damping
        scores = result.scores[q].double()[result.indices[q].argsort()]
        assert (scores - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            {"prompt": "1", "targets": []},
            r"queries\[0\]: targets must be a target or a list of at least one, got \[\]",
        ),
        (
            {"prompt": "1", "targets": 7},
            r"queries\[0\]: targets must be a target or a list of at least one, got 7",
        ),
        ({"prompt": "1", "target": "2", "rather_than": []}, r"queries\[0\]: rather_than must be a target"),
        ({"prompt": "1", "targets": ["2", 3]}, r'queries\[0\] must have "prompt" and "target" \(strings\)'),
        ({"targets": ["2"]}, r'queries\[0\] must have "prompt" and "target"'),
        ({"completions": "1 2"}, r'queries\[0\] must have "prompt" and "target"'),
        ({"completions": [{"prompt": "1"}]}, r'queries\[0\] must have "prompt" and "target"'),
        ({"prompt": "1", "targets": ["2", ""]}, r"queries\[0\] must have a target of at least one token"),
        (
            {"prompt": "1", "target": "2", "rather_than": str(VOCABULARY)},
            r"queries\[0\] must hold token ids from 0 to 96",
        ),
    ],
)
def test_bad_queries(made, query, message):
    model, _, store = made
    with pytest.raises(ValueError, match=message):
        attribute(store, model, [query], tokenizer=Tokenizer(), k=1)
