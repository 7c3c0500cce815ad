import json
import math

import pytest
import torch
import trackstar
from conftest import files_below, make_examples, make_llama
from rich.console import Console
from trackstar import SketchSpec, StoreError, attribute, build_store, open_store
from trackstar.gradients.examples import encode_queries
from trackstar.optimizer.second_moments import SecondMoments
from trackstar.scoring.attribution import query_rows, score_rows
from trackstar.scoring.report import largest_terms, mark, query_words, shorten

SPEC = SketchSpec(sketch=4)
MIXINGS = (0, 0.5, 0.9, 0.99)


def make_queries(count, seed=7):
    queries = []
    for example in make_examples(
        torch.randint(4, 9, (count,), generator=torch.Generator().manual_seed(seed)), seed
    ):
        ids = example["input_ids"]
        queries.append({"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:]})
    return queries


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its corpus and a float32 store of several shards, with an exact correction."""
    torch.manual_seed(0)
    model = make_llama().eval()
    examples = make_examples((torch.arange(60) % 17 + 4).tolist())
    correction = SecondMoments.estimate(model, examples[:20]).correction("exact")
    path = tmp_path_factory.mktemp("store") / "store"
    store = build_store(
        path, model, examples, spec=SPEC, correction=correction, dtype="float32", shard_rows=17
    )
    return model, examples, correction, store


def dense_scores(rows, queries, mixing, task=None):
    """The paper's formula with every matrix formed, in float64, from unwhitened rows (N, L, d) and (Q, L, d)."""
    numerator = row_norms = query_norms = 0.0
    size = rows.shape[2]
    for b in range(rows.shape[1]):
        x, q = rows[:, b].double(), queries[:, b].double()
        t = q if task is None else task[:, b].double()
        train = x.T @ x / len(x)
        train += 0.1 * train.trace() / size * torch.eye(size, dtype=torch.float64)
        inverse = torch.linalg.inv(mixing * (t.T @ t) / len(t) + (1 - mixing) * train)
        numerator = numerator + q @ inverse @ x.T
        row_norms = row_norms + ((x @ inverse) * x).sum(1)
        query_norms = query_norms + ((q @ inverse) * q).sum(1)
    return numerator / (query_norms[:, None] * row_norms[None]).sqrt()


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("count", [1, 5, 24])
@pytest.mark.parametrize("largest", [True, False])
def test_the_whole_answer_equals_dense_float64(made, mixing, count, largest):
    """More queries (24) than a block has dimensions (16) included."""
    model, examples, correction, store = made
    queries = make_queries(count)
    result = attribute(store, model, queries, k=10, mixing=mixing, largest=largest)
    rows = torch.cat(list(trackstar.collect_rows(model, examples, spec=SPEC, correction=correction)))
    asked = torch.cat(list(trackstar.collect_rows(model, queries, spec=SPEC, correction=correction)))
    wanted = dense_scores(rows, asked, mixing)
    scores, indices = wanted.sort(dim=1, descending=largest, stable=True)
    assert (result.scores - scores[:, :10]).abs().max() < 1e-4
    assert torch.equal(result.indices, indices[:, :10])
    assert result.mixing == mixing


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(("count", "others"), [(1, 2), (5, 6), (4, 24)])
def test_r_eval_may_come_from_another_task(made, mixing, count, others):
    """Fewer and more (24) queries than a block has dimensions; in one batch and in several."""
    model, examples, correction, store = made
    queries, task = make_queries(count), make_queries(others, seed=8)
    result = attribute(store, model, queries, k=10, mixing=mixing, task=task)
    x, q, t = (
        torch.cat(list(trackstar.collect_rows(model, some, spec=SPEC, correction=correction)))
        for some in (examples, queries, task)
    )
    wanted = dense_scores(x, q, mixing, task=t)
    scores, indices = wanted.sort(dim=1, descending=True, stable=True)
    assert (result.scores - scores[:, :10]).abs().max() < 1e-4
    assert torch.equal(result.indices, indices[:, :10])
    with_rows = score_rows(store, q, k=10, mixing=mixing, task=t, memory=12_000_000)
    assert (with_rows[0] - scores[:, :10]).abs().max() < 1e-4


def test_terms_sum_to_scores_under_another_task(made):
    model, _, _, store = made
    result = attribute(
        store, model, make_queries(2), k=4, mixing=0.9, task=make_queries(5, seed=8), by_block=True
    )
    torch.testing.assert_close(result.by_block.sum(2), result.scores, rtol=0, atol=1e-5)


def test_the_task_decides_lambda_and_not_who_asks(made, capsys):
    model, _, _, store = made
    task = make_queries(6, seed=8)
    alone, together = (attribute(store, model, make_queries(n), task=task) for n in (1, 5))
    assert alone.mixing == together.mixing
    assert alone.mixing != attribute(store, model, make_queries(5)).mixing
    torch.testing.assert_close(alone.scores[0], together.scores[0], rtol=0, atol=1e-6)
    assert "rank 1" not in capsys.readouterr().err
    attribute(store, model, make_queries(1))
    assert capsys.readouterr().err.count("R_eval of one query has rank 1 in each block") == 1
    attribute(store, model, make_queries(1), mixing=0)
    assert "rank 1" not in capsys.readouterr().err


@pytest.mark.parametrize("mixing", [*MIXINGS, "auto"])
def test_an_example_asked_for_itself_scores_one(made, mixing):
    model, examples, _, store = made
    queries = [{"input_ids": e["input_ids"], "labels": e["input_ids"]} for e in examples[:4]]
    result = attribute(store, model, queries, k=3, mixing=mixing)
    assert result.indices[:, 0].tolist() == [0, 1, 2, 3]
    assert (result.scores[:, 0] - 1).abs().max() < 1e-4
    assert 0 <= result.mixing <= 0.99


def test_float16_answers_as_float32(made, tmp_path):
    model, examples, correction, store = made
    narrow = build_store(tmp_path / "s", model, examples, spec=SPEC, correction=correction, shard_rows=17)
    assert narrow.dtype == "float16"
    queries = make_queries(5)
    a, b = (attribute(s, model, queries, k=60, mixing=0.9) for s in (store, narrow))
    order = [x.indices.argsort(dim=1) for x in (a, b)]
    scores = [x.scores.gather(1, o) for x, o in zip((a, b), order, strict=True)]
    assert (scores[0] - scores[1]).abs().max() < 1e-4


def test_shards_do_not_change_the_answer(made, tmp_path):
    model, examples, correction, store = made
    queries = make_queries(5)
    for shard_rows in (7, 60):
        other = build_store(
            tmp_path / str(shard_rows),
            model,
            examples,
            spec=SPEC,
            correction=correction,
            dtype="float32",
            shard_rows=shard_rows,
        )
        a, b = (attribute(s, model, queries, k=7, mixing=0.5) for s in (store, other))
        assert torch.equal(a.indices, b.indices)
        torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-5)


def test_an_example_without_a_gradient_scores_zero(tmp_path, llama):
    store = build_store(tmp_path / "s", llama, [*make_examples((9, 8, 7)), {"input_ids": [4]}], spec=SPEC)
    result = attribute(store, llama, make_queries(2), k=4, mixing=0.5)
    for scores, indices in zip(result.scores.tolist(), result.indices.tolist(), strict=True):
        assert scores[indices.index(3)] == 0
        assert not any(math.isnan(score) for score in scores)


def test_output_functions_change_the_question_not_the_scale(made):
    model, _, _, store = made
    results = [
        attribute(store, model, make_queries(3), k=5, mixing=0, output=o) for o in ("loss", "margin", "logit")
    ]
    assert all(r.scores.abs().max() <= 1 + 1e-5 for r in results)
    assert not torch.equal(results[0].scores, results[2].scores)


def test_jsonl_is_the_viewers(made, tmp_path):
    model, _, _, store = made
    queries = [q | {"id": f"q{i}"} for i, q in enumerate(make_queries(2))]
    best = attribute(store, model, queries, k=3)
    worst = attribute(store, model, queries, k=3, largest=False)
    best.to_jsonl(tmp_path / "new" / "out.jsonl", query_set="set", opponents=worst)
    lines = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert [line["example_id"] for line in lines] == ["q0", "q1"]
    first = lines[0]
    assert set(first) == {
        "example_id",
        "query_set",
        "inputs_plaintext",
        "targets_plaintext",
        "proponents",
        "proponent_ids",
        "proponent_scores",
        "opponents",
        "opponent_ids",
        "opponent_scores",
    }
    assert first["proponent_ids"] == [str(i) for i in best.indices[0].tolist()]
    assert first["opponent_scores"] == worst.scores[0].tolist()


def test_opponents_come_from_the_same_scan(made, tmp_path):
    model, _, _, store = made
    both = attribute(store, model, make_queries(2), k=3, opponents=True)
    worst = attribute(store, model, make_queries(2), k=3, largest=False)
    assert both.largest
    assert not both.opponents.largest
    for found, alone in ((both, attribute(store, model, make_queries(2), k=3)), (both.opponents, worst)):
        assert torch.equal(found.scores, alone.scores)
        assert torch.equal(found.indices, alone.indices)
    both.to_jsonl(tmp_path / "out.jsonl")
    line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert line["opponent_scores"] == worst.scores[0].tolist()


@pytest.mark.parametrize("mixing", [0, 0.9])
def test_filters_and_little_memory_change_what_is_read_not_the_scores(made, mixing):
    model, _, _, store = made
    everything = attribute(store, model, make_queries(5), k=60, mixing=mixing)
    scores = everything.scores.gather(1, everything.indices.argsort(dim=1))
    kept = torch.tensor([1, 2, 3, 30, 31, 59])
    for where in (kept, [str(i) for i in kept.tolist()], lambda example: example.index in kept):
        result = attribute(store, model, make_queries(5), k=6, mixing=mixing, where=where, memory=20_000_000)
        order = result.indices.argsort(dim=1)
        assert torch.equal(result.indices.gather(1, order), kept.expand(5, 6))
        torch.testing.assert_close(result.scores.gather(1, order), scores[:, kept], rtol=0, atol=1e-6)


def test_results_are_written_whole_or_not_at_all(made, tmp_path, monkeypatch):
    model, _, _, store = made
    result = attribute(store, model, make_queries(2), k=3)
    (tmp_path / "out.jsonl").write_text("what was there")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("trackstar.storage.store.Store.text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        result.to_jsonl(tmp_path / "out.jsonl")
    assert files_below(tmp_path) == {"out.jsonl": b"what was there"}


def test_the_table_marks_the_querys_words(made):
    model, _, _, store = made
    result = attribute(store, model, make_queries(2), k=3)
    screen = Console(record=True, width=100, force_terminal=False)
    trackstar.print_result(result, screen)
    text = screen.export_text()
    assert "rank" in text
    assert text.count("proponents") == 2
    assert f"{result.scores[0, 0].item():+.4f}" in text


def test_marking():
    words = query_words("The capital of Kenya is Nairobi")
    assert words == {"capital", "kenya", "nairobi"}
    assert mark("Kenya's Capital: the city.", words, plain=True).plain == "*Kenya*'s *Capital*: the city."
    coloured = mark("a Kenya", words, plain=False)
    assert coloured.plain == "a Kenya"
    assert [(s.start, s.end) for s in coloured.spans] == [(2, 7)]
    assert shorten("word " * 100) == "word " * 59 + "word …"
    assert shorten("two\n  lines") == "two lines"
    assert largest_terms(torch.tensor([0.1, -0.3, 0.2]), ["a", "b", "c"], 2) == "b -0.3000, c +0.2000"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k must be an int from 1 to 60 \(the store's examples\), got 0"),
        ({"k": 61}, r"k must be an int from 1 to 60 \(the store's examples\), got 61"),
        ({"mixing": 1}, 'mixing must be "auto" or a number with 0 ≤ mixing < 1, got 1'),
        ({"mixing": math.nan}, "got nan"),
        (
            {"k": 3, "where": [7, 9]},
            r"k must be an int from 1 to 2 \(the examples that where leaves\), got 3",
        ),
        ({"where": lambda example: False}, "where must keep at least one of the 60 rows of the store"),
        (
            {"memory": 1000},
            "memory must be at least .* bytes for 2 queries and k = 10 on this store, got 1,000",
        ),
        ({"output": "score"}, "output must be one of loss, margin, logit; got 'score'"),
        ({"task": make_queries(1)}, "task must hold at least two queries, got 1: R_eval would be of rank 1"),
        ({"task": [{"prompt": "a"}] * 2}, r"task: queries\[0\] must have"),
        ({"queries": []}, "queries must hold at least one query"),
        ({"queries": [{"prompt": "a"}]}, r"queries\[0\] must have \"prompt\" and \"target\""),
        ({"queries": [{"prompt": "a", "target": "b"}]}, "tokenizer must be given"),
        ({"queries": [{"input_ids": [1, 2], "labels": [-100, -100]}]}, r"queries\[0\] must have a target"),
        (
            {"queries": [{"input_ids": [1, 2], "labels": [2]}]},
            "labels must be as long as input_ids, 2 tokens",
        ),
        ({"queries": [{"input_ids": [1, 200], "labels": [1, 200]}]}, "from 0 to 96"),
    ],
)
def test_bad_input(made, arguments, message):
    model, _, _, store = made
    queries = arguments.pop("queries", make_queries(2))
    with pytest.raises(ValueError, match=message):
        attribute(store, model, queries, **arguments)


def test_another_model_is_refused(made):
    _, _, _, store = made
    with pytest.raises(StoreError, match=r"model must be the one that .* was built with: its fingerprint is"):
        attribute(store, make_llama(), make_queries(1))


def test_nan_weights_are_named(made):
    _, _, _, store = made
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(
        ValueError, match=r"model must have finite weights; 'model.layers.1.mlp.up_proj.weight' holds NaN"
    ):
        attribute(store, model, make_queries(1))


def test_an_incomplete_store_is_refused(made, tmp_path):
    from trackstar.storage.manifest import Manifest

    model, _, _, store = made
    manifest = Manifest.read(store.path)
    (tmp_path / "s").mkdir()
    Manifest(manifest.identity, manifest.row_shape, manifest.parts, manifest.total).write(tmp_path / "s")
    with pytest.raises(StoreError, match="is not complete: run its build again"):
        attribute(open_store(tmp_path / "s"), model, make_queries(1))


def test_rows_and_scan_are_separate_steps(made):
    """A server keeps the store open, and rows of queries can be made elsewhere."""
    model, _, _, store = made
    queries = encode_queries(make_queries(3), None)
    rows = query_rows(store, model, queries)
    scores, indices, mixing = score_rows(open_store(store.path), rows, k=4)
    whole = attribute(store, model, make_queries(3), k=4)
    assert torch.equal(scores, whole.scores)
    assert torch.equal(indices, whole.indices)
    assert mixing == whole.mixing
