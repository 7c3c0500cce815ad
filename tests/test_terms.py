"""What scores are sums of, against dense float64."""

import pytest
import torch
import trackstar
import transformers
from conftest import SIZES, explicit_rows, make_examples, make_gpt2, make_llama
from trackstar import SketchSpec, attribute, build_store
from trackstar.optimizer.second_moments import SecondMoments
from trackstar.scoring.terms import block_terms

pytestmark = pytest.mark.usefixtures("unsynced")

LENGTHS = (5, 9, 17, 2, 30, 4, 12, 9, 21, 7, 8, 6)


def make_queries(count):
    examples = make_examples([6 + i % 4 for i in range(count)], seed=5)
    return [e | {"labels": [-100] * (len(e["input_ids"]) - 2) + e["input_ids"][-2:]} for e in examples]


def scales_of(correction):
    """V^(-1/2) of every module as the matrix that the correction stands for."""
    if correction is None:
        return None
    if correction.kind == "exact":
        return {name: scale.double() for name, scale in correction.scales.items()}
    return {name: u.T.double() @ v.double() for name, (u, v) in correction.factors.items()}


def dense_terms(rows, queries, mixing):
    """Each block's term (Q, N, L) of the paper's formula in float64, and x_qᵀR⁻¹ (Q, L, d) and 1/√(norms) (Q, N)."""
    x, q, size = rows.double(), queries.double(), rows.shape[2]
    terms, by_query = torch.zeros(len(q), len(x), x.shape[1], dtype=torch.float64), torch.zeros_like(q)
    row_norms, query_norms = (
        torch.zeros(len(x), dtype=torch.float64),
        torch.zeros(len(q), dtype=torch.float64),
    )
    for b in range(x.shape[1]):
        train = x[:, b].T @ x[:, b] / len(x)
        train += 0.1 * train.trace() / size * torch.eye(size, dtype=torch.float64)
        inverse = torch.linalg.inv(mixing * (q[:, b].T @ q[:, b]) / len(q) + (1 - mixing) * train)
        by_query[:, b] = q[:, b] @ inverse
        terms[:, :, b] = by_query[:, b] @ x[:, b].T
        row_norms += ((x[:, b] @ inverse) * x[:, b]).sum(1)
        query_norms += (by_query[:, b] * q[:, b]).sum(1)
    scales = (query_norms[:, None] * row_norms[None]).rsqrt()
    return terms * scales[:, :, None], by_query, scales


def make_mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2})
    )


def make_gemma2():
    """Runs padded, or one by one: packing would change its results."""
    config = {"head_dim": 8, "pad_token_id": None, "final_logit_softcapping": 5.0}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES | config))


MODELS = {"llama": make_llama, "gpt2": make_gpt2, "mixtral": make_mixtral, "gemma2": make_gemma2}


def make_case(folder, family="llama", kind="none", spec=None, dtype="float32", examples=None):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    spec = SketchSpec(sketch=4) if spec is None else spec
    examples = make_examples(LENGTHS) if examples is None else examples
    correction = None
    if kind != "none":
        correction = SecondMoments.estimate(model, examples[:8], spec=spec).correction(
            kind.split()[0], rank=int(kind[-1]) if "rank" in kind else 1
        )
    store = build_store(
        folder / "s", model, examples, spec=spec, correction=correction, dtype=dtype, shard_rows=5
    )
    return model, examples, correction, store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("terms"), kind="exact", spec=SketchSpec(sketch=3))


def rows_of(model, examples, store):
    return torch.cat(
        list(trackstar.collect_rows(model, examples, spec=store.spec, correction=store.correction))
    )


@pytest.mark.parametrize("mixing", [0, 0.5, 0.99])
@pytest.mark.parametrize("count", [1, 4, 20])
@pytest.mark.parametrize("largest", [True, False])
def test_block_terms_equal_dense_float64_and_sum_to_the_score(made, mixing, count, largest, monkeypatch):
    """More queries (20) than a block has dimensions (9) included; the store's rows read three at a time."""
    model, examples, _, store = made
    monkeypatch.setattr("trackstar.scoring.terms.ROW_BYTES", 3 * 4 * 14 * 9)
    queries = make_queries(count)
    result = attribute(store, model, queries, k=5, mixing=mixing, largest=largest, by_block=True)
    terms, _, _ = dense_terms(rows_of(model, examples, store), rows_of(model, queries, store), mixing)
    wanted = terms.gather(1, result.indices[:, :, None].expand(-1, -1, 14))
    assert (result.by_block - wanted).abs().max() < 1e-5
    assert (result.by_block.sum(2) - result.scores).abs().max() < 1e-5
    assert result.blocks == store.spec.block_names(model)
    assert result.by_token is None


def test_only_the_rows_found_are_read(made, monkeypatch):
    from trackstar.storage.shard import Shard

    model, _, _, store = made
    result = attribute(store, model, make_queries(2), k=2, mixing=0.5)
    read, floats = [], Shard.floats
    monkeypatch.setattr(Shard, "floats", lambda self, a, b: read.extend(range(a, b)) or floats(self, a, b))
    block_terms(store, torch.randn(2, 14, 9), 0.5, result.indices)
    assert read == sorted(set(result.indices.flatten().tolist()))


def test_terms_of_opponents_and_of_examples_without_a_gradient(tmp_path):
    model, _, _, store = make_case(tmp_path, examples=[*make_examples(LENGTHS), {"input_ids": [4]}])
    result = attribute(
        store, model, make_queries(2), k=13, mixing=0.5, opponents=True, by_block=True, by_token=True
    )
    for found in (result, result.opponents):
        assert (found.by_block.sum(2) - found.scores).abs().max() < 1e-5
        for scores, tokens in zip(found.scores, found.by_token, strict=True):
            assert (torch.stack([part.sum() for part in tokens]) - scores).abs().max() < 1e-5
    for q in range(2):
        place = result.indices[q].tolist().index(12)
        assert not result.by_block[q, place].any()
        assert result.by_token[q][place].tolist() == [0.0]


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4", "sign"])
def test_block_terms_of_narrow_rows_sum_to_their_scores(tmp_path, dtype):
    model, _, _, store = make_case(tmp_path, dtype=dtype)
    result = attribute(store, model, make_queries(3), k=12, mixing=0.9, by_block=True)
    assert (result.by_block.sum(2) - result.scores).abs().max() < 1e-5


def explicit_token_terms(model, example, spec, scales, direction):
    """δ_t x_tᵀ of every module and token, formed, corrected, projected, and multiplied with a direction: (T,)."""
    weights, block_of, seen = spec.weights(model), spec.block_of(model), {}

    def keep(name):
        def hook(module, inputs, output):
            output.retain_grad()
            seen[name] = inputs[0].detach(), output

        return hook

    hooks = [weight.module.register_forward_hook(keep(name)) for name, weight in weights.items()]
    ids = torch.tensor([example["input_ids"]])
    logits = model(input_ids=ids).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    terms = torch.zeros(ids.shape[1], dtype=torch.float64)
    for name, (x, y) in seen.items():
        gradients = y.grad[0].double()[:, :, None] * x[0].double()[:, None]
        if scales is not None:
            gradients = gradients * scales[name]
        left, right = spec.projections(name, x.shape[-1], y.shape[-1])
        sketches = left.double() @ gradients @ right.double().T
        terms += sketches.flatten(1) @ direction[block_of[name]]
    return terms


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llama", kind) for kind in ("none", "rank 1", "rank 2", "exact")),
        ("gpt2", "exact"),
        ("gemma2", "exact"),
    ],
)
def test_token_terms_equal_explicit_gradients_of_tokens(tmp_path, family, kind):
    """In packed, padded and single passes."""
    spec = SketchSpec(sketch=4, blocks=4)
    model, examples, correction, store = make_case(tmp_path, family, kind, spec)
    queries = make_queries(3)
    result = attribute(store, model, queries, k=8, mixing=0.7, by_token=True)
    scales = scales_of(correction)
    rows = explicit_rows(model, examples, spec, scales)
    _, by_query, norms = dense_terms(rows, explicit_rows(model, queries, spec, scales), 0.7)
    for q in range(3):
        for place, index in enumerate(result.indices[q].tolist()):
            wanted = explicit_token_terms(model, examples[index], spec, scales, by_query[q]) * norms[q, index]
            got = result.by_token[q][place]
            assert (got - wanted).norm() < 1e-3 * wanted.norm()
            assert abs(got.sum() - result.scores[q, place]) < 1e-5
            assert got[-1] == 0  # nothing is predicted from the last token


@pytest.mark.parametrize(
    ("family", "kind", "spec"),
    [
        ("mixtral", "exact", SketchSpec(sketch=4)),
        (
            "mixtral",
            "rank 2",
            SketchSpec(sketch=4, kind="countsketch", also=["lm_head", "norms", "embeddings"]),
        ),
        (
            "gpt2",
            "exact",
            SketchSpec(
                sketch=4,
                split={"*.c_attn": 3},
                modules=["!*.wpe"],
                also=["biases", "norms", "embeddings", "lm_head"],
            ),
        ),
    ],
)
def test_token_terms_of_everything_that_can_be_captured_sum_to_the_score(tmp_path, family, kind, spec):
    """Experts with the tokens routed to them, parts, vectors and tables."""
    model, _, _, store = make_case(tmp_path, family, kind, spec)
    result = attribute(store, model, make_queries(3), k=12, mixing=0.5, by_token=True)
    for scores, indices, tokens in zip(result.scores, result.indices.tolist(), result.by_token, strict=True):
        assert [len(part) for part in tokens] == [LENGTHS[i] for i in indices]
        sums = torch.stack([part.sum() for part in tokens])
        sizes = torch.stack([part.abs().sum() for part in tokens])
        assert ((sums - scores).abs() < 1e-4 * sizes).all()


def test_labels_that_the_store_does_not_keep_are_noticed(tmp_path):
    examples = make_examples(LENGTHS)
    masked = [
        e | {"labels": [-100] * (len(e["input_ids"]) // 2) + e["input_ids"][len(e["input_ids"]) // 2 :]}
        for e in examples
    ]
    model, _, _, store = make_case(tmp_path, examples=masked)
    with pytest.raises(
        ValueError, match=r"by_token: the tokens of example '\d+' sum to .* labels of its own"
    ):
        attribute(store, model, make_queries(3), k=3, by_token=True)


def test_token_terms_are_of_what_the_rows_are_gradients_of(tmp_path):
    model = make_llama().eval()
    store = build_store(
        tmp_path / "store",
        model,
        make_examples(LENGTHS),
        spec=SketchSpec(sketch=4),
        dtype="float32",
        output="margin",
    )
    result = attribute(store, model, make_queries(3), k=5, mixing=0.5, by_token=True)
    for scores, terms in zip(result.scores, result.by_token, strict=True):
        sums = torch.stack([term.sum() for term in terms])
        assert torch.allclose(sums, scores, atol=1e-5)
