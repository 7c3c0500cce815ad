import dataclasses
import re

import numpy as np
import pytest
import torch
import trackstar
from conftest import VOCABULARY, files_below, make_examples, make_llama, relative_error
from trackstar import SecondMoments, SketchSpec, StoreError
from trackstar.curvature import rotation
from trackstar.planning.plan import plan_build

pytestmark = pytest.mark.usefixtures("unsynced")

SPEC = SketchSpec(sketch=4)
LENGTHS = (5, 9, 17, 3, 30, 2, 12, 8, 21, 6, 40)


def collected(model, examples, spec=SPEC, correction=None):
    return torch.cat(list(trackstar.collect_rows(model, examples, spec=spec, correction=correction))).double()


def dense_curvature(rows):
    """R (L, d, d): the mean of x xᵀ, plus a tenth of its mean eigenvalue on the diagonal."""
    second = torch.einsum("nbi,nbj->bij", rows, rows) / len(rows)
    size = second.shape[1]
    trace = second.diagonal(dim1=1, dim2=2).sum(dim=1)
    return second + 0.1 * (trace / size)[:, None, None] * torch.eye(size, dtype=torch.float64)


def dense_whitener(curvature):
    eigenvalues, vectors = torch.linalg.eigh(curvature)
    return vectors @ torch.diag_embed(eigenvalues.rsqrt()) @ vectors.transpose(1, 2)


@pytest.mark.parametrize(
    ("dtype", "wide", "tolerance"),
    [
        ("float32", None, 2e-4),
        ("float16", None, 1e-3),
        ("int8", None, 2e-2),
        ("int4", None, 0.2),
        ("sign", None, 0.8),
        ("int4", "float16", 1e-3),
        ("sign", "float32", 2e-4),
    ],
)
def test_stored_rows_are_whitened_rows(tmp_path, model, dtype, wide, tolerance):
    examples = make_examples(LENGTHS)
    store = trackstar.build_store(tmp_path, model, examples, spec=SPEC, dtype=dtype, wide=wide, shard_rows=4)
    rows = collected(model, examples)
    curvature = dense_curvature(rows)
    assert relative_error(store.curvature.train, curvature) < 1e-5
    whitened = torch.einsum("bij,nbj->nbi", dense_whitener(curvature), rows)
    if dtype in ("int8", "int4", "sign"):
        whitened = whitened @ rotation(SPEC.block_size).T
    got = store.rows(0, len(store))
    assert got.dtype == torch.float32
    assert relative_error(got, whitened) < tolerance
    assert torch.equal(store.rows(3, 9), got[3:9])
    torch.testing.assert_close(store.squared_norms.double(), whitened.square().sum(dim=2), rtol=4e-4, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "sign"])
def test_the_whitener_whitens(tmp_path, llama, dtype):
    store = trackstar.build_store(tmp_path, llama, make_examples(LENGTHS), spec=SPEC, dtype=dtype)
    curvature, whitener = store.curvature.train, store.curvature.whitener.double()
    identity = torch.eye(SPEC.block_size, dtype=torch.float64).expand_as(curvature)
    torch.testing.assert_close(whitener @ curvature @ whitener.mT, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(whitener.mT @ whitener @ curvature, identity, rtol=0, atol=1e-4)
    assert torch.allclose(whitener, whitener.mT, rtol=0, atol=1e-6) == (dtype == "float16")
    eigenvalues = torch.linalg.eigvalsh(curvature)
    torch.testing.assert_close(store.curvature.eigenvalues, eigenvalues, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["exact", "rank"])
def test_corrected_rows_are_stored_with_their_correction(tmp_path, llama, kind):
    examples = make_examples(LENGTHS)
    correction = SecondMoments.estimate(llama, examples).correction(kind, rank=2)
    store = trackstar.build_store(
        tmp_path, llama, examples, spec=SPEC, correction=correction, dtype="float32", shard_rows=4
    )
    rows = collected(llama, examples, correction=correction)
    whitened = torch.einsum("bij,nbj->nbi", dense_whitener(dense_curvature(rows)), rows)
    assert relative_error(store.rows(0, len(store)), whitened) < 2e-4
    kept = store.correction
    assert (kept.kind, kept.source, kept.rank) == (correction.kind, correction.source, correction.rank)
    for name, scale in correction.scales.items():
        assert torch.equal(kept.scales[name], scale)


def test_a_sample_stands_for_the_corpus(tmp_path, llama):
    """R_train is that of some ``sample`` distinct examples, the same ones every time."""
    examples = make_examples(LENGTHS)
    stores = [
        trackstar.build_store(
            tmp_path / name, llama, examples, spec=SPEC, sample=6, shard_rows=shard_rows, dtype="float32"
        )
        for name, shard_rows in (("a", 4), ("b", 5))
    ]
    rows = collected(llama, examples)
    chosen = np.sort(np.random.default_rng(0).choice(len(examples), 6, replace=False))
    curvature = dense_curvature(rows[chosen])
    whitened = torch.einsum("bij,nbj->nbi", dense_whitener(curvature), rows)
    for store in stores:
        assert relative_error(store.curvature.train, curvature) < 1e-5
        assert relative_error(store.rows(0, len(store)), whitened) < 2e-4
    assert not (tmp_path / "a" / "staging").exists()


def test_text_tokens_ids_and_metadata_come_back(tmp_path, llama):
    metadata = {"source": "née", "year": 1999, "nested": [{"a": None}, 0.5], "": {}}
    texts = ["plain", "naïve – 日本語 🜚", "", "two\nlines\0nul", "", "", "", "end"]
    lengths = (3, 5, 1, 7, 0, 0, 0, 2)
    examples = make_examples(lengths)
    for i, (example, text) in enumerate(zip(examples, texts, strict=True)):
        example |= {"text": text, "id": f"id/{i} é", "metadata": metadata} if i else {"text": text}
    # The third shard holds nothing but empty examples.
    store = trackstar.build_store(tmp_path, llama, examples, spec=SPEC, shard_rows=2)
    assert len(store) == len(examples)
    for i, example in enumerate(examples):
        assert store.text(i) == texts[i]
        assert store.id(i) == example.get("id", "0")
        assert store.metadata(i) == example.get("metadata", {})
        assert store.tokens(i).dtype == np.int32
        assert store.tokens(i).tolist() == example["input_ids"]
    for read in (store.text, store.id, store.tokens, store.metadata):
        for index in (-1, len(examples)):
            with pytest.raises(IndexError, match=rf"index must be from 0 to 7, got {index}"):
                read(index)


def test_examples_without_a_loss_have_rows_of_zeros(tmp_path, llama):
    examples = make_examples((4, 0, 1, 9))
    examples.append({"input_ids": [1, 2, 3], "labels": [-100] * 3})
    store = trackstar.build_store(tmp_path, llama, examples, spec=SPEC, shard_rows=2)
    silent = store.rows(0, 5).abs().sum(dim=(1, 2)) == 0
    assert silent.tolist() == [False, True, True, False, True]
    assert (store.squared_norms == 0).all(dim=1).tolist() == silent.tolist()


def test_building_again_changes_nothing(tmp_path, llama):
    def state():
        return {
            path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes())
            for path in [tmp_path, *tmp_path.rglob("*")]
        }

    arguments = tmp_path, llama, make_examples(LENGTHS)
    trackstar.build_store(*arguments, spec=SPEC, shard_rows=4)
    before = state()
    store = trackstar.build_store(*arguments, spec=SPEC, shard_rows=4)
    assert store.complete
    assert state() == before


def changed_model():
    torch.manual_seed(1)
    return make_llama().eval()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "another"}, "model.fingerprint"),
        ({"examples": make_examples(LENGTHS, seed=1)}, "data[0].fingerprint"),
        ({"examples": make_examples(LENGTHS[1:])}, "data[0].examples = 11, this build has 10"),
        ({"spec": SketchSpec(sketch=5)}, "spec.sketch = 4, this build has 5"),
        (
            {"spec": SketchSpec(sketch=4, modules=["*q_proj"])},
            "spec.modules = None",
        ),
        ({"correction": "exact"}, "correction = None"),
        ({"dtype": "float32"}, "dtype = 'float16', this build has 'float32'"),
        ({"dtype": "int8", "wide": "float16"}, "dtype = 'float16', this build has 'int8'"),
        ({"sample": 7}, "curvature.sample = 11, this build has 7"),
        ({"shard_rows": 5}, "shard_rows = 4, this build has 5"),
    ],
)
def test_a_different_build_is_refused_with_the_difference_named(tmp_path, llama, change, field):
    arguments = {"model": llama, "examples": make_examples(LENGTHS), "spec": SPEC, "shard_rows": 4}
    trackstar.build_store(tmp_path, **arguments)
    before = files_below(tmp_path)
    if "model" in change:
        change = {"model": changed_model()}
    if "correction" in change:
        moments = SecondMoments.estimate(llama, arguments["examples"])
        change = {"correction": moments.correction("exact")}
    with pytest.raises(StoreError, match=re.escape(f"was built with {field}")) as caught:
        trackstar.build_store(tmp_path, **(arguments | change))
    assert "\n" not in str(caught.value)
    assert files_below(tmp_path) == before


def test_the_same_patterns_are_the_same_spec(tmp_path, llama):
    spec = SketchSpec(sketch=4, modules=("*q_proj", "*up_proj"))
    for _ in range(2):
        store = trackstar.build_store(tmp_path, llama, make_examples(LENGTHS), spec=spec)
    assert store.spec == spec


def test_resume_false_refuses_a_store(tmp_path, llama):
    trackstar.build_store(tmp_path, llama, make_examples(LENGTHS), spec=SPEC, resume=False)
    with pytest.raises(StoreError, match=r"must not hold a store when resume=False"):
        trackstar.build_store(tmp_path, llama, make_examples(LENGTHS), spec=SPEC, resume=False)


@pytest.mark.parametrize("name", ["thesis.tex", "shards/0", "staging/0"])
def test_a_foreign_folder_is_left_alone(tmp_path, llama, name):
    """Also one whose names look like a store's: without a manifest they are not."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(StoreError, match=rf"holds '{name.split('/')[0]}' and no manifest.json"):
        trackstar.build_store(tmp_path, llama, make_examples(LENGTHS), spec=SPEC)
    assert files_below(tmp_path) == {name: b"mine"}


def test_a_file_in_the_way(tmp_path, llama):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match=r"path must be a folder, got the file"):
        trackstar.build_store(tmp_path / "file", llama, make_examples(LENGTHS), spec=SPEC)
    with pytest.raises(FileExistsError, match=r"file"):
        trackstar.build_store(tmp_path / "file" / "below", llama, make_examples(LENGTHS), spec=SPEC)
    assert files_below(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "examples must hold at least one example, got none"),
        ([{"id": 1}], r"examples\[0\] must have .* got the fields \['id'\]"),
        ([{"text": "a"}], "tokenizer must be given"),
        (
            [{"input_ids": [1, 2], "labels": [1]}],
            r"labels must be as long as input_ids, 2 tokens",
        ),
        ([{"input_ids": [1, VOCABULARY]}], rf"examples\[0\] must hold token ids from 0 to {VOCABULARY - 1}"),
        ([{"input_ids": [1, -1]}], r"examples\[0\] must hold token ids"),
        ([{"input_ids": [1], "metadata": "x"}], r"examples\[0\]: metadata must be a mapping, got str"),
        (
            [{"input_ids": [1], "metadata": {"a": set()}}],
            r"examples\[0\]: metadata must hold JSON values alone",
        ),
        ([{"input_ids": [1], "metadata": {"a": float("nan")}}], r"metadata must hold JSON values alone"),
        ([{"input_ids": [1]}], "the sample's gradients must not be zero throughout"),
    ],
)
def test_unusable_examples(tmp_path, llama, examples, message):
    with pytest.raises(ValueError, match=message):
        trackstar.build_store(tmp_path, llama, examples, spec=SPEC)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int3"}, "dtype must be one of float32, float16, int8, int4, sign; got 'int3'"),
        (
            {"wide": "float32"},
            "wide must be None, or float32 or float16 beside int8, int4 or sign; got 'float32'",
        ),
        ({"dtype": "int8", "wide": "int4"}, "wide must be None, or .*; got 'int4' beside int8"),
        ({"sample": 0}, "sample must be an int of at least 1, got 0"),
        ({"sample": 2.5}, "sample must be an int of at least 1, got 2.5"),
        ({"shard_rows": True}, "shard_rows must be an int of at least 1, got True"),
    ],
)
def test_unusable_arguments(tmp_path, llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        trackstar.build_store(tmp_path, llama, make_examples(LENGTHS), spec=SPEC, **arguments)


def test_weights_that_are_not_finite(tmp_path, llama):
    name, weight = list(llama.named_parameters())[-1]
    with torch.no_grad():
        weight.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=rf"model must have finite weights; '{name}' holds NaN or Inf"):
        trackstar.build_store(tmp_path, llama, make_examples(LENGTHS), spec=SPEC)


def test_a_gradient_that_is_not_finite_names_its_example(tmp_path, llama, monkeypatch):
    """Finite weights, but one example overflows; what came before it is kept, and nothing of it is."""
    examples = make_examples((8, 8, 8, 8))
    examples[2] |= {"id": "the bad one", "text": "overflow"}
    bad = torch.tensor(examples[2]["input_ids"])
    forward = llama.model.embed_tokens.forward

    def overflowing(ids):
        return forward(ids) * torch.where((ids == bad).all(dim=1), torch.inf, 1.0)[:, None, None]

    monkeypatch.setattr(llama.model.embed_tokens, "forward", overflowing)
    with pytest.raises(
        FloatingPointError,
        match=r"example 'the bad one' by 'model.layers.0.self_attn.q_proj' holds NaN or Inf: 'overflow'",
    ):
        trackstar.build_store(tmp_path, llama, examples, spec=SPEC, shard_rows=2)
    monkeypatch.undo()
    monkeypatch.setattr("os.fsync", lambda handle: None)
    assert trackstar.build_store(tmp_path, llama, examples, spec=SPEC, shard_rows=2).complete


@pytest.mark.parametrize(
    ("correction", "coding"),
    [(None, {}), ("exact", {}), (None, {"dtype": "int8", "wide": "float16"}), (None, {"dtype": "sign"})],
)
def test_the_plan_knows_the_disk(tmp_path, llama, correction, coding):
    examples = make_examples([20 + i % 40 for i in range(300)])
    for i, example in enumerate(examples):
        example["text"] = f"Passage {i}. " * 5
    chosen = correction and SecondMoments.estimate(llama, examples[:8]).correction(correction)
    plans = []

    def remember(*arguments, **options):
        plans.append(plan_build(*arguments, **options))
        return plans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trackstar.storage.build.plan_build", remember)
        trackstar.build_store(
            tmp_path, llama, examples, spec=SketchSpec(sketch=8), correction=chosen, **coding
        )
    plan = plans[0]
    found = sum(len(content) for content in files_below(tmp_path).values())
    assert plan.rows == len(examples)
    assert plan.store_bytes == pytest.approx(found, rel=0.05)
    with pytest.raises(OSError, match=r"the build needs .* of disk, .* are free"):
        dataclasses.replace(plan, store_bytes=1 << 60).require_disk()


def test_the_plan_counts_what_is_left(tmp_path, llama, monkeypatch):
    from trackstar.storage import build

    left = []

    def remember(*arguments, written, pending):
        left.append((written, pending))
        return plan_build(*arguments, written=written, pending=pending)

    def stop_at(name, call):
        """Build until the ``call``-th use of a function of build.py, counted from 1."""
        uses, wanted = [], getattr(build, name)

        def stopping(*arguments):
            uses.append(name)
            if len(uses) == call:
                raise KeyboardInterrupt
            return wanted(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(build, name, stopping)
            run()

    def run():
        trackstar.build_store(tmp_path, llama, make_examples(LENGTHS), spec=SPEC, shard_rows=4)

    monkeypatch.setattr(build, "plan_build", remember)
    stop_at("write_staged", 2)
    stop_at("write_shard", 3)
    run()
    assert left == [(0, sum(LENGTHS)), (0, sum(LENGTHS[4:])), (8, 0)]


def test_plan_and_progress_leave_standard_output_alone(tmp_path, llama, capsys):
    trackstar.build_store(tmp_path, llama, make_examples(LENGTHS), spec=SPEC)
    out, err = capsys.readouterr()
    assert out == ""
    assert "11 rows of 14 × 16 to write" in err
    assert "collecting: 11/11 examples" in err
    assert "writing: 11/11 examples" in err
