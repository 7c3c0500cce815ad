"""EK-FAC against its definition in dense float64 matrices, and against the Fisher matrix where it is exact."""

import types

import pytest
import torch
import transformers
from conftest import SIZES, make_examples, make_llama, make_neox
from ekfac_reference import dense_curvature, dense_scores, drawn_gradients, token_gradients
from torch import nn
from trackstar.ekfac import capture as capture_module
from trackstar.ekfac import fit_factors, influence
from trackstar.ekfac.capture import TokenCapture
from trackstar.ekfac.inverse import DampedInverse, low_rank
from trackstar.ekfac.sampling import LEVELS, coins_of, draw, sampled_nll
from trackstar.ekfac.scoring import scores_of, terms_of, thin_queries, whole_query
from trackstar.gradients.examples import EncodedQuery, encode_examples, encode_queries
from trackstar.gradients.modules import select_weights
from transformers.modeling_outputs import CausalLMOutput

pytestmark = pytest.mark.usefixtures("unsynced")

NARROW = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20, "num_hidden_layers": 1}
SMALL = {
    "llama": lambda: make_llama(**NARROW, num_key_value_heads=1),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES | NARROW)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES | NARROW | {"n_inner": 20})),
}
"""Models whose matrices have few enough entries for a dense G."""

LENGTHS = (5, 9, 17, 3, 30, 2, 12, 9, 9)
QUERIES = [
    {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, 4, 5]},
    {"input_ids": [7, 8, 9, 1], "labels": [-100, -100, 9, -100]},
    {"input_ids": list(range(20)), "labels": [-100] * 19 + [19]},
]


def seen_tokens(model, examples, patterns=None, biases=False, **options):
    """What TokenCapture shows: for each example {module: (x, δ)} float64."""
    capture = TokenCapture(model, patterns, biases=biases)
    found = [{} for _ in examples]

    def add(name, x, delta, batch):
        for i, a, d in zip(batch.members, x.split(batch.tokens), delta.split(batch.tokens), strict=True):
            found[i][name] = a.double(), d.double()

    for _ in capture.run(examples, add, **options):
        pass
    return found


def close(got, wanted, tolerance):
    """Whether ‖got − wanted‖ ≤ tolerance · ‖wanted‖, or both are nothing."""
    return (got.double() - wanted.double()).norm() <= tolerance * wanted.double().norm() + 1e-7


@pytest.mark.parametrize("biases", [False, True])
def test_examples_gradients_are_autograd_s(model, biases):
    given = make_examples(LENGTHS)
    given[2]["labels"] = [*given[2]["input_ids"][:4], *[-100] * 13]
    examples = encode_examples(given, None)
    modules = {name: weight.module for name, weight in select_weights(model).items()}
    for example, seen in zip(examples, seen_tokens(model, examples, biases=biases), strict=True):
        wanted = token_gradients(model, modules, example, biases=biases)
        assert list(wanted) == list(modules)
        for name, (x, delta) in wanted.items():
            assert seen[name][0].shape == x.shape
            assert close(seen[name][1].T @ seen[name][0], delta.T @ x, 1e-5)


def test_padded_batches_show_the_same_tokens(llama, monkeypatch):
    examples = encode_examples(make_examples(LENGTHS), None)
    packed = seen_tokens(llama, examples)
    monkeypatch.setattr(capture_module.LeanPass, "_find_longest_packed", lambda self: 0)
    for left, right in zip(packed, seen_tokens(llama, examples), strict=True):
        for name in left:
            assert close(left[name][0], right[name][0], 1e-5)
            assert close(left[name][1], right[name][1], 1e-5)


@pytest.fixture(params=list(SMALL))
def small(request):
    torch.manual_seed(0)
    return SMALL[request.param]().eval()


@pytest.mark.parametrize("biases", [False, True])
def test_scores_are_those_of_the_dense_inverse(small, tmp_path, biases):
    """Of G put together from its Kronecker eigenbasis in float64."""
    model = small
    given = make_examples(LENGTHS)
    examples, queries = encode_examples(given, None), encode_queries(QUERIES, None)
    modules = {name: weight.module for name, weight in select_weights(model).items()}
    factors = fit_factors(tmp_path / "factors", model, given, biases=biases)
    result = influence(factors, model, given, QUERIES, k=len(given), damping=0.1)
    drawn = drawn_gradients(model, modules, examples, biases=biases)
    curvatures = {name: dense_curvature(drawn, name) for name in modules}
    wanted = dense_scores(
        curvatures,
        *([token_gradients(model, modules, e, biases=biases) for e in side] for side in (queries, examples)),
    )
    assert result.blocks == tuple(modules)
    for q in range(len(queries)):
        assert close(result.by_block[q], wanted[q][result.indices[q]], 1e-3)
        assert close(result.scores[q], wanted[q].sum(1)[result.indices[q]], 1e-3)
        assert result.indices[q].tolist() == wanted[q].sum(1).argsort(descending=True).tolist()


class OneOfTwo(nn.Module):
    """A token in, one of two tokens out: tokens are unit vectors, all but two outputs are impossible.

    Output gradients are then multiples of one vector and inputs orthogonal, so the Fisher matrix is diagonal in the
    Kronecker basis, and EK-FAC is the Fisher matrix.
    """

    def __init__(self, size=6):
        super().__init__()
        self.config = types.SimpleNamespace()
        self.embed = nn.Embedding.from_pretrained(torch.eye(size))
        self.head = nn.Linear(size, size)
        with torch.no_grad():
            self.head.bias[2:] = -1e4

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        return CausalLMOutput(logits=self.head(self.embed(input_ids)))


def test_scores_are_those_of_the_fisher_matrix_where_ekfac_is_exact(tmp_path):
    torch.manual_seed(0)
    model = OneOfTwo()
    inputs = [a for a in range(6) for _ in range(3 + 2 * a)]
    given = [{"input_ids": [a, i % 2]} for i, a in enumerate(inputs)]
    queries = [{"input_ids": [a, a % 2], "labels": [-100, a % 2]} for a in range(4)]
    examples, asked = encode_examples(given, None), encode_queries(queries, None)
    factors = fit_factors(tmp_path / "factors", model, given)
    result = influence(factors, model, given, queries, k=len(given), damping=0.1)
    modules = {"head": model.head}
    drawn = torch.stack(
        [(d.T @ x).flatten() for x, d in (t["head"] for t in drawn_gradients(model, modules, examples))]
    )
    fisher = drawn.T @ drawn / len(given)
    assert torch.linalg.matrix_rank(fisher) > 3
    wanted = dense_scores(
        {"head": fisher}, *([token_gradients(model, modules, e) for e in side] for side in (asked, examples))
    ).sum(2)
    assert wanted.abs().max() > 1
    for q in range(len(queries)):
        assert close(result.scores[q], wanted[q][result.indices[q]], 1e-5)


def test_drawn_labels_make_the_true_fisher_on_average():
    """E[δ δᵀ] = diag(p) − p pᵀ, by the gradient of losses for drawn labels: errors fall as 1/√draws."""
    logits = torch.randn(1, 11, generator=torch.Generator().manual_seed(0)) * 2
    p = logits.softmax(1)[0].double()
    wanted = p.diag() - torch.outer(p, p)
    example = encode_examples([{"input_ids": [0] * 4001}], None)[0]
    draws = 0
    total = torch.zeros_like(wanted)
    for seed in range(5):
        coins = coins_of(example, seed, 3)
        delta = sampled_nll(logits.repeat(len(coins), 1), coins).double()
        total += delta.T @ delta
        draws += len(coins)
    assert draws == 20_000
    assert close(total / draws, wanted, 5 / draws**0.5)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 97, 1000])
def test_labels_follow_their_probabilities(size):
    generator = torch.Generator().manual_seed(size)
    p = torch.rand(size, generator=generator).double() ** 3
    p[size // 2] += 0.5
    p[: size // 3] = 0
    count = 40_000
    example = encode_examples([{"input_ids": [0] * (count + 1)}], None)[0]
    labels = draw(p.float().expand(count, -1), coins_of(example, 0, 0))
    found = torch.bincount(labels, minlength=size)
    assert found[p == 0].sum() == 0
    p /= p.sum()
    spread = (count * p * (1 - p)).sqrt()
    assert ((found - count * p).abs() <= 5 * spread + 1).all()


def test_coins_are_a_function_of_seed_example_and_token():
    short, long = encode_examples([{"input_ids": [0] * 4}, {"input_ids": [0] * 9}], None)
    masked = encode_examples([{"input_ids": [0] * 9, "labels": [-100, 0, -100, 0, 0, 0, -100, 0, 0]}], None)[
        0
    ]
    coins = coins_of(long, 1, 2)
    assert coins.shape == (8, LEVELS)
    assert coins.min() >= 0
    assert coins.max() < 1
    assert torch.equal(coins_of(short, 1, 2), coins[:3])
    assert torch.equal(coins_of(masked, 1, 2), coins[[0, 2, 3, 4, 6, 7]])
    for other in (coins_of(long, 0, 2), coins_of(long, 1, 3)):
        assert not (other == coins).all(dim=1).any()
    # Golden: the mapping is public.
    assert (coins_of(long, 1, 2)[0, :3] * 2**24).tolist() == GOLDEN_COINS


GOLDEN_COINS = [5189443, 5988731, 619155]


def test_batches_do_not_change_factors(llama, tmp_path, monkeypatch):
    given = make_examples(LENGTHS)
    one = fit_factors(tmp_path / "one", llama, given)
    monkeypatch.setattr(capture_module, "BATCH_TOKENS", 1)
    other = fit_factors(tmp_path / "other", llama, given)
    gradient = torch.Generator().manual_seed(0)
    for name, (fan_out, fan_in) in one.shapes.items():
        x, delta = (torch.randn(3, n, generator=gradient) for n in (fan_in, fan_out))
        left, right = (DampedInverse(f, 0.1, torch.device("cpu")).whole(name, x, delta) for f in (one, other))
        assert close(left, right, 1e-3)
        assert close(one.eigenvalues(name).sum(), other.eigenvalues(name).sum(), 1e-5)


def test_thin_matrices_of_full_rank_score_as_whole_ones(model, tmp_path):
    given = make_examples(LENGTHS)
    examples, queries = encode_examples(given, None), encode_queries(QUERIES, None)
    factors = fit_factors(tmp_path / "factors", model, given)
    capture = TokenCapture(model)
    inverse = DampedInverse(factors, 0.1, torch.device("cpu"))
    whole = torch.stack(
        [
            terms_of(capture, examples, whole_query(capture, query, inverse, "loss"), lambda n: None).scores
            for query in queries
        ]
    )
    errors = []
    for rank in (2, 8, 10_000):
        thin = thin_queries(capture, queries, inverse, rank, "loss")
        assert all(u.shape[2] == min(rank, *capture.shapes[name]) for name, (u, _) in thin.factors.items())
        scores = scores_of(capture, examples, thin, lambda n: None)
        errors.append(((scores - whole).norm() / whole.norm()).item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_low_rank_is_close_to_the_best():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 70, generator=generator) * torch.logspace(0, -3, 70)
    u, s, vh = torch.linalg.svd(matrix)
    for rank in (1, 5, 20):
        left, right = low_rank(matrix, rank)
        assert (left.shape, right.shape) == ((40, rank), (70, rank))
        best = s[rank:].norm()
        assert (matrix - left @ right.T).norm() <= 1.01 * best
    thin = u[:, :4] @ vh[:4]
    assert close(torch.mm(*(m if i == 0 else m.T for i, m in enumerate(low_rank(thin, 4)))), thin, 1e-5)
    assert torch.equal(low_rank(thin, 4)[0], low_rank(thin, 4)[0])


def test_terms_are_tokens_and_modules_and_sum_to_the_score(llama, tmp_path):
    given = make_examples(LENGTHS)
    given[1]["labels"] = [-100, *given[1]["input_ids"][1:5], -100, -100, -100, -100]
    factors = fit_factors(tmp_path / "factors", llama, given)
    result = influence(factors, llama, given, QUERIES, k=len(given))
    capture = TokenCapture(llama)
    modules = capture.modules
    inverse = DampedInverse(factors, 0.1, torch.device("cpu"))
    for q, query in enumerate(encode_queries(QUERIES, None)):
        whole = whole_query(capture, query, inverse, "loss")
        for place, index in enumerate(result.indices[q].tolist()):
            example = result.corpus.encoded[index]
            wanted = torch.zeros(len(example), len(modules), dtype=torch.float64)
            for layer, (name, (x, delta)) in enumerate(token_gradients(llama, modules, example).items()):
                wanted[: len(x), layer] = ((delta @ whole[name].double()) * x).sum(1)
            assert close(result.by_token[q][place], wanted.sum(1), 1e-4)
            assert close(result.by_block[q, place], wanted.sum(0), 1e-4)
        scale = result.scores[q].abs().max()
        assert (result.by_block[q].sum(1) - result.scores[q]).abs().max() < 1e-5 * scale
        sums = torch.stack([terms.sum() for terms in result.by_token[q]])
        assert (sums - result.scores[q]).abs().max() < 1e-5 * scale


def test_an_influence_is_how_much_a_loss_falls(tmp_path):
    """A step of size ε along (G + λI)⁻¹ ∇L_m changes the query's loss by −ε I(m, q)."""
    torch.manual_seed(0)
    model = make_neox().eval()
    given = make_examples(LENGTHS)
    factors = fit_factors(tmp_path / "factors", model, given)
    result = influence(factors, model, given, QUERIES[:1], k=len(given))
    query = encode_queries(QUERIES[:1], None)[0]
    ids, labels = torch.from_numpy(query.tokens).long()[None], torch.from_numpy(query.labels[1:]).long()
    capture, inverse = TokenCapture(model), DampedInverse(factors, 0.1, torch.device("cpu"))

    def loss_after(step, size):
        moved = make_neox().double().eval()
        moved.load_state_dict(model.state_dict())
        with torch.no_grad():
            for name, weight in select_weights(moved).items():
                weight.module.weight -= size * step[name].double()
            logits = moved(input_ids=ids).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()

    for place in (0, len(given) - 1):
        example = result.corpus.encoded[int(result.indices[0, place])]
        step = whole_query(capture, EncodedQuery(**vars(example)), inverse, "loss")
        size = 1e-4 / max(part.norm().item() for part in step.values())
        fall = (loss_after(step, -size) - loss_after(step, size)) / (2 * size)
        assert fall == pytest.approx(result.scores[0, place].item(), rel=1e-3)
