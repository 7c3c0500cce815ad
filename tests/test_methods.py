"""Every method against its definition, slow and obvious, in float64."""

import json
import math
import re
import sys
from collections import Counter

import pytest
import torch
import trackstar
import transformers
from conftest import make_examples, make_llama
from test_attribute import dense_scores, make_queries
from tokenizers import Tokenizer, models, pre_tokenizers
from trackstar import SketchSpec, StoreError, attribute, build_store, companion_store, open_store, tracin
from trackstar.ekfac import fit_factors, influence
from trackstar.gradients.examples import encode_queries
from trackstar.optimizer.second_moments import SecondMoments
from trackstar.scoring.attribution import query_rows
from trackstar.scoring.methods import GRADIENTS, METHODS, READERS

pytestmark = pytest.mark.usefixtures("unsynced")

SPEC = SketchSpec(sketch=4)
QUERIES = make_queries(5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its corpus, and a float32 store of it with an exact correction."""
    torch.manual_seed(0)
    model = make_llama().eval()
    examples = make_examples((torch.arange(40) % 17 + 4).tolist())
    # Half of the corpus is learned somewhat, so that TRAK has something to weigh.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for example in examples[:20] * 15:
        ids = torch.tensor([example["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    correction = SecondMoments.estimate(model, examples[:20]).correction("exact")
    path = tmp_path_factory.mktemp("methods") / "store"
    store = build_store(
        path, model, examples, spec=SPEC, correction=correction, dtype="float32", shard_rows=17
    )
    return model, examples, correction, store


def rows_of(model, examples, **options):
    return torch.cat(list(trackstar.collect_rows(model, examples, spec=SPEC, **options))).double()


def damped_inverse(rows):
    """R⁻¹ (L, d, d) of rows (N, L, d)."""
    moment = torch.einsum("nbi,nbj->bij", rows, rows) / len(rows)
    d = rows.shape[2]
    mean = moment.diagonal(dim1=1, dim2=2).mean(1)
    return torch.linalg.inv(moment + 0.1 * mean[:, None, None] * torch.eye(d, dtype=torch.float64))


def mean_probability(model, example):
    ids = torch.tensor([example["input_ids"]])
    with torch.no_grad():
        chances = model(input_ids=ids).logits[0, :-1].double().softmax(1)
    return chances.gather(1, ids[0, 1:, None]).mean().item()


def cosines(q, x):
    q, x = q.flatten(1), x.flatten(1)
    return (q / q.norm(dim=1, keepdim=True)) @ (x / x.norm(dim=1, keepdim=True)).T


def defined(method, model, examples, queries, correction):
    """Scores (Q, N) as docs/methods.md writes them."""
    if method in ("v-norm", "v-r-norm"):
        x, q = (rows_of(model, side, correction=correction) for side in (examples, queries))
    else:
        output = "margin" if method == "trak" else "loss"
        x, q = (rows_of(model, side, output=output) for side in (examples, queries))
    if method in ("dot", "tracin"):
        return torch.einsum("qbi,nbi->qn", q, x)
    if method in ("cosine", "v-norm"):
        return cosines(q, x)
    if method in ("r-norm", "v-r-norm"):
        return dense_scores(x, q, 0)
    products = torch.einsum("qbi,bij,nbj->qn", q, damped_inverse(x), x)
    if method == "logra":
        return products
    assert method == "trak"
    left = torch.tensor([1 - mean_probability(model, example) for example in examples])
    return products / len(examples) * left


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("method", [name for name in GRADIENTS if name != "trackstar"])
def test_a_method_is_its_definition(made, method, largest):
    model, examples, correction, store = made
    result = attribute(
        companion_store(store, model, method), model, QUERIES, method=method, k=10, largest=largest
    )
    wanted = defined(method, model, examples, QUERIES, correction)
    scores, indices = wanted.sort(dim=1, descending=largest, stable=True)
    assert (result.scores - scores[:, :10]).abs().max() < 2e-5 * wanted.abs().max()
    assert torch.equal(result.indices, indices[:, :10])
    assert (result.method, result.mixing, result.largest) == (method, None, largest)


def test_trackstar_is_unchanged_by_its_name(made):
    model, _, _, store = made
    named, default = attribute(store, model, QUERIES, method="trackstar"), attribute(store, model, QUERIES)
    assert torch.equal(named.scores, default.scores)
    assert named.mixing == default.mixing > 0


def test_weights_of_trak_differ(made):
    model, examples, _, _ = made
    chances = [mean_probability(model, example) for example in examples]
    assert max(chances) > 5 * min(chances)


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4", "sign"])
@pytest.mark.parametrize("method", ["dot", "cosine", "logra", "trak"])
def test_methods_on_narrow_rows(made, tmp_path, method, dtype):
    """What is compared are the rows that the codes stand for."""
    model, _, _, store = made
    wide = companion_store(store, model, method)
    narrow = trackstar.reencode_store(wide.path, tmp_path / "narrow", dtype)
    decoded = narrow.rows(0, len(narrow)).double()
    queries = query_rows(narrow, model, encode_queries(QUERIES, None))
    whitener = narrow.curvature.whitener.double()
    x, q = torch.linalg.solve(whitener[None], decoded[..., None])[..., 0], queries.double()
    y = torch.einsum("bij,qbj->qbi", whitener, q)
    wanted = {
        "dot": lambda: torch.einsum("qbi,nbi->qn", q, x),
        "cosine": lambda: cosines(q, x),
        "logra": lambda: torch.einsum("qbi,nbi->qn", y, decoded),
        "trak": lambda: (
            torch.einsum("qbi,nbi->qn", y, decoded)
            / 40
            * torch.tensor([1 - mean_probability(model, example) for example in made[1]])
        ),
    }[method]()
    result = attribute(narrow, model, QUERIES, method=method, k=7, opponents=True)
    for found, largest in ((result, True), (result.opponents, False)):
        scores, indices = wanted.sort(dim=1, descending=largest, stable=True)
        assert (found.scores - scores[:, :7]).abs().max() < 2e-5 * wanted.abs().max()
        assert torch.equal(found.indices, indices[:, :7])


@pytest.mark.parametrize("method", [name for name in METHODS if name not in READERS])
def test_filters_opponents_and_little_memory(made, method, tmp_path):
    """Part of the rows, in either direction, with the scores of the whole."""
    model, examples, _, store = made
    options = {}
    if method == "ekfac":
        fit_factors(tmp_path / "factors", model, examples[:10])
        options["factors"] = tmp_path / "factors"
    store = companion_store(store, model, method)
    everything = attribute(store, model, QUERIES, method=method, k=40, **options)
    scores = everything.scores.gather(1, everything.indices.argsort(dim=1))
    kept = torch.tensor([1, 2, 3, 18, 30, 39])
    result = attribute(
        store, model, QUERIES, method=method, k=3, opponents=True, where=kept, memory=20_000_000, **options
    )
    for found, largest in ((result, True), (result.opponents, False)):
        wanted, places = scores[:, kept].sort(dim=1, descending=largest)
        torch.testing.assert_close(found.scores, wanted[:, :3], rtol=1e-4, atol=1e-6)
        assert torch.equal(found.indices, kept[places[:, :3]])
        assert (found.method, found.corpus.id(5)) == (method, "5")


def test_examples_without_a_gradient_score_zero(tmp_path, llama):
    examples = [*make_examples((9, 8, 7)), {"input_ids": [4]}]
    store = build_store(tmp_path / "s", llama, examples, spec=SPEC)
    for method in GRADIENTS:
        if GRADIENTS[method].corrected is not True:
            found = attribute(companion_store(store, llama, method), llama, QUERIES, method=method, k=4)
            assert (found.scores[found.indices == 3] == 0).all()
            assert not found.scores.isnan().any()


def other_checkpoint(model):
    torch.manual_seed(1)
    other = make_llama().eval()
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.mul_(0.5).add_(theirs, alpha=0.5)
    return other


def test_tracin_sums_over_checkpoints(made, tmp_path):
    model, examples, _, _ = made
    models, rates = (model, other_checkpoint(model)), (0.3, 2.0)
    stores = [
        build_store(tmp_path / str(i), m, examples, spec=SPEC, dtype="float32") for i, m in enumerate(models)
    ]
    wanted = sum(
        rate * torch.einsum("qbi,nbi->qn", rows_of(m, QUERIES), rows_of(m, examples))
        for m, rate in zip(models, rates, strict=True)
    )
    kept = torch.tensor([0, 1, 2, 17, 30, 39])
    for where, positions in ((None, torch.arange(40)), (kept, kept)):
        result = tracin(
            zip(stores, models, rates, strict=True), QUERIES, k=5, opponents=True, where=where, memory=1
        )
        for found, largest in ((result, True), (result.opponents, False)):
            scores, places = wanted[:, positions].sort(dim=1, descending=largest)
            assert (found.scores - scores[:, :5]).abs().max() < 2e-5 * wanted.abs().max()
            assert torch.equal(found.indices, positions[places[:, :5]])
            assert found.method == "tracin"


def test_tracin_refuses_what_does_not_belong_together(made, tmp_path):
    model, examples, _, store = made
    plain = companion_store(store, model, "tracin")
    other = build_store(tmp_path / "other", model, examples[:20], spec=SPEC)
    for checkpoints, message in (
        ([], "checkpoints must hold at least one"),
        ([(plain, model, 0)], "learning rate of .* must be a number above 0, got 0"),
        ([(plain, model, math.nan)], "must be a number above 0, got nan"),
        ([(plain, model, 1.0), (other, model, 1.0)], "checkpoints must be of the same examples"),
        ([(store, model, 1.0)], "method tracin needs a store of uncorrected gradients of the loss"),
    ):
        with pytest.raises(ValueError, match=message):
            tracin(checkpoints, QUERIES, k=3)


def words_of(text):
    return [word for word in re.findall(r"\b\w\w+\b", text.lower()) if word not in ("and", "is", "of", "the")]


def bm25(query, texts):
    words = [words_of(text) for text in texts]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for text in words:
        score, counts = 0.0, Counter(text)
        for word in words_of(query):
            holders = sum(word in other for other in words)
            rarity = math.log(1 + (len(words) - holders + 0.5) / (holders + 0.5))
            score += rarity * counts[word] / (counts[word] + 1.5 * (0.25 + 0.75 * len(text) / mean))
        scores.append(score)
    return scores


TEXTS = [
    "Nairobi is the capital of Kenya.",
    "The shilling is the currency of Kenya, of Uganda and of Tanzania",
    "Lima",
    "!!",
    "The capital of Peru is Lima; Lima, Lima.",
]
ASKED = [
    {"prompt": "The capital of Peru is", "target": " Lima"},
    {"prompt": "zzz", "target": " yyy", "id": "nothing in common"},
]


@pytest.fixture
def texts(llama, tmp_path):
    """A store of texts; its tokens do not matter."""
    examples = [{"text": text, "input_ids": [1 + i, 2, 3]} for i, text in enumerate(TEXTS)]
    return build_store(tmp_path / "texts", llama, examples, spec=SPEC)


def test_bm25_is_its_formula(texts):
    result = attribute(texts, None, ASKED, method="bm25", k=5)
    for q, query in enumerate(ASKED):
        wanted = torch.tensor(bm25(query["prompt"] + query["target"], TEXTS), dtype=torch.float64)
        scores, indices = wanted.sort(descending=True, stable=True)
        torch.testing.assert_close(result.scores[q].double(), scores, rtol=1e-5, atol=1e-6)
        assert torch.equal(result.indices[q], indices)
        part = attribute(texts, None, [query], method="bm25", k=2, where=[1, 2], opponents=True)
        torch.testing.assert_close(part.scores[0].double(), wanted[part.indices[0]], rtol=1e-5, atol=1e-6)
        assert sorted(part.indices[0].tolist()) == [1, 2]
        assert part.scores[0].tolist() == part.opponents.scores[0].tolist()[::-1]
    assert result.queries[1].id == "nothing in common"


def save_encoder(folder, *, mean=True, normalized=True, kinds=()):
    """A tiny sentence-transformers model."""
    words = sorted({word for text in [*TEXTS, "zzz yyy"] for word in re.findall(r"\w+|[^\w\s]+", text)})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    kinds = kinds or ("Transformer", "Pooling", *(["Normalize"] if normalized else []))
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" * (i > 0),
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": not mean, "pooling_mode_mean_tokens": mean}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16} | modes))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6}))
    return folder


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_dense_is_the_cosine_of_embeddings(texts, tmp_path, mean, normalized):
    folder = save_encoder(tmp_path / "encoder", mean=mean, normalized=normalized)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.BertModel.from_pretrained(folder).eval().double()

    def embed(text):
        ids = torch.tensor([tokenizer(text)["input_ids"][:6]])
        with torch.no_grad():
            hidden = encoder(input_ids=ids).last_hidden_state[0]
        return hidden.mean(0) if mean else hidden[0]

    given, asked = (
        torch.stack([embed(text) for text in side])
        for side in (TEXTS, [query["prompt"] + query["target"] for query in ASKED])
    )
    scores, indices = cosines(asked, given).sort(dim=1, descending=True)
    result = attribute(texts, None, ASKED, method="dense", k=5, encoder=folder)
    torch.testing.assert_close(result.scores.double(), scores, rtol=0, atol=1e-5)
    assert torch.equal(result.indices, indices)


def test_encoders_that_are_not_understood(texts, tmp_path):
    with pytest.raises(FileNotFoundError, match="encoder must be a folder of a sentence-transformers model"):
        attribute(texts, None, ASKED, method="dense", k=1, encoder=tmp_path)
    folder = save_encoder(tmp_path / "encoder", kinds=("Transformer", "Pooling", "Dense"))
    with pytest.raises(ValueError, match=r"has Transformer, Pooling, Dense"):
        attribute(texts, None, ASKED, method="dense", k=1, encoder=folder)
    folder = save_encoder(tmp_path / "none", mean=None)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ValueError, match=r"must pool by mean or first token, .* has pooling_mode_max_tokens"):
        attribute(texts, None, ASKED, method="dense", k=1, encoder=folder)


def test_ekfac_answers_about_the_store(made, tmp_path):
    model, examples, _, store = made
    factors = fit_factors(tmp_path / "factors", model, examples[:10])
    alone = influence(factors, model, examples, QUERIES, k=6)
    result = attribute(store, model, QUERIES, method="ekfac", k=6, factors=tmp_path / "factors")
    torch.testing.assert_close(result.scores, alone.scores)
    assert torch.equal(result.indices, alone.indices)
    assert (result.method, result.corpus) == ("ekfac", store)


def test_a_companion_is_the_store_that_build_would_make(made, tmp_path):
    model, examples, _, store = made
    for method, output in (("logra", "loss"), ("trak", "margin")):
        found = companion_store(store, model, method, path=tmp_path / method)
        wanted = build_store(
            tmp_path / output, model, examples, spec=SPEC, dtype="float32", output=output, shard_rows=17
        )
        assert found.identity == wanted.identity
        assert torch.equal(found.rows(0, 40), wanted.rows(0, 40))
        assert companion_store(wanted, model, method) is wanted


def test_a_companion_follows_its_store(llama, tmp_path, capsys):
    examples = [example | {"metadata": {"n": i}} for i, example in enumerate(make_examples((5, 6, 7, 8)))]
    correction = SecondMoments.estimate(llama, examples).correction("exact")
    path = tmp_path / "s"
    build_store(path, llama, examples, spec=SPEC, correction=correction)
    first = companion_store(open_store(path), llama, "dot")
    assert "method dot needs uncorrected gradients of the loss" in capsys.readouterr().err
    assert first.path == tmp_path / "s.uncorrected"
    companion_store(open_store(path), llama, "cosine")
    assert capsys.readouterr().err == ""
    trackstar.append_store(path, llama, make_examples((9, 4), seed=1))
    trackstar.append_store(path, llama, make_examples((3,), seed=2))
    trackstar.delete_rows(path, [1, 5])
    store = open_store(path)
    found = companion_store(store, llama, "dot")
    assert (found.parts, found.deleted.tolist()) == (store.parts, [1, 5])
    assert torch.equal(found.rows(0, 4)[[0, 2, 3]], first.rows(0, 4)[[0, 2, 3]])
    assert found.metadata(3) == {"n": 3}
    trak = attribute(companion_store(store, llama, "trak"), llama, QUERIES, method="trak", k=5)
    assert not {1, 5} & set(trak.indices.flatten().tolist())


def test_work_on_a_store_goes_on_with_its_output(llama, tmp_path):
    given, more = make_examples((5, 6, 7, 8)), make_examples((9, 4), seed=1)
    path = tmp_path / "s"
    store = build_store(path, llama, given, spec=SPEC, dtype="float32", output="margin", shard_rows=4)
    assert store.output == "margin"
    store = trackstar.append_store(path, llama, more)
    wanted = torch.einsum(
        "bij,nbj->nbi", store.curvature.whitener.double(), rows_of(llama, more, output="margin")
    )
    torch.testing.assert_close(store.rows(4, 6).double(), wanted, rtol=1e-4, atol=1e-4)
    before = store.rows(0, 6).clone()
    (path / "shards" / "0000000004-0000000006" / "rows" / "data.ninja").write_bytes(b"")
    assert trackstar.repair_store(path, llama, given + more) == ["shards/0000000004-0000000006"]
    assert torch.equal(open_store(path).rows(0, 6), before)
    other = build_store(tmp_path / "o", llama, more, spec=SPEC, dtype="float32", curvature=store.curvature)
    with pytest.raises(StoreError, match="its output is 'loss' instead of 'margin'"):
        trackstar.merge_stores(tmp_path / "m", [path, other.path])


def test_probabilities_are_kept_and_checked(made):
    model, _, _, store = made
    found = companion_store(store, model, "trak")
    before = attribute(found, model, QUERIES, method="trak", k=5)
    (folder,) = (found.path / "probabilities").iterdir()
    assert torch.equal(attribute(found, model, QUERIES, method="trak", k=5).scores, before.scores)
    (data,) = [file for file in (folder / "rows").iterdir() if file.stat().st_size == 160]
    whole = data.read_bytes()
    data.write_bytes(bytes(4) + whole[4:])
    with pytest.raises(StoreError, match=r"remove .* and run this again"):
        attribute(found, model, QUERIES, method="trak", k=5)
    data.write_bytes(whole)


def test_labels_that_are_not_kept_are_noticed(llama, tmp_path):
    examples = [example | {"labels": [-100, *example["input_ids"][1:]]} for example in make_examples((5, 6))]
    examples[1]["labels"][3] = -100
    correction = SecondMoments.estimate(llama, examples).correction("exact")
    store = build_store(tmp_path / "s", llama, examples, spec=SPEC, correction=correction)
    with pytest.raises(StoreError, match="had labels of their own, which a store does not keep"):
        companion_store(store, llama, "cosine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method must be one of dot, cosine, .*, dense; got 'best'"),
        ({"method": "cosine"}, r"needs a store of uncorrected gradients of the loss, .* companion_store\(\)"),
        ({"method": "trak"}, "method trak needs a store of uncorrected gradients of the margin"),
        ({"method": "v-norm", "mixing": 0.5}, 'mixing must be "auto" with method v-norm'),
        ({"method": "v-norm", "task": QUERIES}, "task must be None with method v-norm"),
        ({"method": "ekfac"}, "factors must be given with method ekfac, got None"),
        ({"method": "dense"}, "encoder must be given with method dense, got None"),
        ({"method": "dot", "encoder": "x"}, "encoder must be None with method dot, got 'x'"),
        ({"method": "bm25"}, 'must have "prompt" and "target" where there is no tokenizer'),
        ({"method": "v-norm", "model": None}, "model must be given with method v-norm, got None"),
        ({"method": "v-norm", "by_token": True}, "by_block and by_token must be False with method v-norm"),
        ({"method": "v-norm", "k": 41}, "k must be an int from 1 to 40"),
        ({"method": "v-norm", "memory": 1000}, "memory must be at least"),
    ],
)
def test_one_clear_line(made, options, message):
    model, _, _, store = made
    with pytest.raises(ValueError, match=message):
        attribute(store, options.pop("model", model), QUERIES, **options)


def test_a_correction_cannot_be_made_up(llama, tmp_path):
    store = build_store(tmp_path / "s", llama, make_examples((5, 6)), spec=SPEC)
    for ask in (
        lambda: companion_store(store, llama, "v-norm"),
        lambda: attribute(store, llama, QUERIES, method="v-norm"),
    ):
        with pytest.raises(
            ValueError, match="holds uncorrected gradients of the loss: build one with a correction"
        ):
            ask()


def test_bm25_without_its_package(texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"method bm25 needs bm25s: pip install"):
        attribute(texts, None, ASKED, method="bm25", k=1)
