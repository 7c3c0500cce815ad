"""Append, merge, delete, re-encode, re-whiten, repair, verify: what they make of a store that is whole."""

import errno
import os

import numpy as np
import pytest
import torch
import trackstar
from conftest import files_below, make_examples, make_llama
from killable import SPEC, tiny_model
from trackstar import SketchSpec, StoreError
from trackstar.scoring.attribution import score_rows

LENGTHS = (5, 9, 17, 3, 30, 2, 12, 8, 21, 6, 40)
EXAMPLES = [
    {**example, "text": f"text {i} é", "metadata": {"parity": i % 2}}
    for i, example in enumerate(make_examples(LENGTHS))
]
QUERIES = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 4, 9], "labels": [-100, 4, 9]}]

pytestmark = pytest.mark.usefixtures("unsynced")


def build(path, examples=EXAMPLES, **changes):
    arguments = {"spec": SPEC, "dtype": "float32", "shard_rows": 3} | changes
    return trackstar.build_store(path, tiny_model(), examples, **arguments)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Seven documents: what the others are appended to or merged with. Not to be changed."""
    return build(tmp_path_factory.mktemp("first") / "store", EXAMPLES[:7])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, first):
    """All documents, whitened as those of ``first`` are. Not to be changed."""
    return build(tmp_path_factory.mktemp("whole") / "store", curvature=first.curvature)


def relative(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def assert_same_documents(store, examples, first=0):
    for i, example in enumerate(examples, start=first):
        assert store.text(i) == example["text"]
        assert store.tokens(i).tolist() == example["input_ids"]
        assert store.metadata(i) == example["metadata"]


class TestAppend:
    def test_new_rows_follow_the_old_ones(self, tmp_path, whole):
        before = build(tmp_path, EXAMPLES[:7])
        held = files_below(tmp_path)
        after = trackstar.append_store(tmp_path, tiny_model(), EXAMPLES[7:])
        assert (len(before), len(after)) == (7, 11)
        # The same sketch, correction and R_train; how documents are batched, which shards decide, is rounding.
        assert relative(after.rows(0, 11), whole.rows(0, 11)) < 1e-5
        assert torch.equal(after.rows(0, 7), before.rows(0, 7))
        assert torch.equal(after.squared_norms[:7], before.squared_norms)
        assert_same_documents(after, EXAMPLES)
        assert [after.id(i) for i in range(11)] == [str(i) for i in range(11)]
        assert [part["examples"] for part in after.parts] == [7, 4]
        # Nothing that was there has changed but the manifest.
        assert {name: held[name] for name in held if name != "manifest.json"}.items() <= files_below(
            tmp_path
        ).items()

    def test_a_reader_keeps_its_version(self, tmp_path):
        reader = build(tmp_path, EXAMPLES[:7])
        rows = torch.randn(2, *reader.row_shape, generator=torch.Generator().manual_seed(0))
        expected = score_rows(reader, rows, k=7)[:2]
        again = trackstar.open_store(tmp_path)
        trackstar.append_store(tmp_path, tiny_model(), EXAMPLES[7:])
        for store in (reader, again):
            assert len(store) == 7
            for got, wanted in zip(score_rows(store, rows, k=7), expected, strict=False):
                assert torch.equal(got, wanted)
            with pytest.raises(IndexError, match="index must be from 0 to 6"):
                store.text(7)

    def test_the_same_documents_are_not_added_twice(self, tmp_path):
        build(tmp_path, EXAMPLES[:7])
        trackstar.append_store(tmp_path, tiny_model(), EXAMPLES[7:9])
        trackstar.append_store(tmp_path, tiny_model(), EXAMPLES[9:])
        before = files_below(tmp_path)
        for _ in range(2):
            assert len(trackstar.append_store(tmp_path, tiny_model(), EXAMPLES[9:])) == 11
            assert len(build(tmp_path, EXAMPLES[:7])) == 11
        assert files_below(tmp_path) == before

    def test_an_interrupted_append(self, tmp_path, monkeypatch):
        from trackstar.storage import append

        build(tmp_path, EXAMPLES[:5])
        rows_of, calls = append.rows_of, []

        def interrupted(*arguments, **options):
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return rows_of(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(append, "rows_of", interrupted)
            trackstar.append_store(tmp_path, tiny_model(), EXAMPLES[5:10])
        seen = trackstar.open_store(tmp_path)
        assert (len(seen), seen.complete, len(seen.shards), len(seen.parts)) == (5, True, 2, 1)
        others = EXAMPLES[10:]
        with pytest.raises(StoreError, match=r"an append of 5 other documents .* was interrupted"):
            trackstar.append_store(tmp_path, tiny_model(), others)
        after = trackstar.append_store(tmp_path, tiny_model(), others, resume=False)
        assert len(after) == 6
        assert_same_documents(after, others, first=5)
        assert trackstar.verify_store(after) == []

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"model": "another"}, StoreError, "its fingerprint is"),
            ({"examples": []}, ValueError, "examples must hold at least one example"),
            ({"examples": [{"input_ids": [1, 97]}]}, ValueError, "must hold token ids from 0 to 96"),
            ({"path": "missing"}, FileNotFoundError, "there is no store at"),
        ],
    )
    def test_bad_input_changes_nothing(self, tmp_path, change, error, message):
        build(tmp_path, EXAMPLES[:4])
        before = files_below(tmp_path)
        arguments = {"path": tmp_path, "model": tiny_model(), "examples": EXAMPLES[4:]} | change
        if "model" in change:
            arguments["model"] = make_llama(num_hidden_layers=1).eval()
        if "path" in change:
            arguments["path"] = tmp_path / "missing"
        with pytest.raises(error, match=message):
            trackstar.append_store(**arguments)
        assert files_below(tmp_path) == before


class TestDelete:
    def test_rows_are_left_out_and_the_others_stay(self, tmp_path, whole):
        build(tmp_path, curvature=whole.curvature)
        reader = trackstar.open_store(tmp_path)
        store = trackstar.delete_rows(tmp_path, [4, 0, 4])
        store = trackstar.delete_rows(tmp_path, np.array([9, 3, 5]))
        assert (len(store), store.end, store.deleted.tolist()) == (6, 11, [0, 3, 4, 5, 9])
        assert (len(reader), reader.deleted.tolist()) == (11, [])
        rows = torch.randn(3, *whole.row_shape, generator=torch.Generator().manual_seed(0))
        for largest in (True, False):
            scores, indices, _ = score_rows(whole, rows, k=11, mixing=0.5, largest=largest)
            got_scores, got_indices, _ = score_rows(store, rows, k=6, mixing=0.5, largest=largest)
            kept = ~torch.isin(indices, store.deleted)
            assert torch.equal(got_indices, indices[kept].reshape(3, 6))
            assert torch.equal(got_scores, scores[kept].reshape(3, 6))
        with pytest.raises(ValueError, match=r"k must be an int from 1 to 6"):
            score_rows(store, rows, k=7)
        found = store.rows(0, 11)
        assert not found[store.deleted].any()
        assert not store.squared_norms[store.deleted].any()
        assert torch.equal(found[[1, 2, 6, 7, 8, 10]], whole.rows(0, 11)[[1, 2, 6, 7, 8, 10]])
        assert torch.equal(store.rows(2, 8), found[2:8])
        for read in (store.text, store.id, store.tokens, store.metadata):
            with pytest.raises(IndexError, match="example 4 was deleted"):
                read(4)
        assert_same_documents(store, [EXAMPLES[6]], first=6)
        assert trackstar.verify_store(store) == []

    def test_deleting_again_changes_nothing(self, tmp_path):
        build(tmp_path)
        trackstar.delete_rows(tmp_path, [1, 2])
        before = files_below(tmp_path)
        assert trackstar.delete_rows(tmp_path, [2, 1]).deleted.tolist() == [1, 2]
        assert len(trackstar.delete_rows(tmp_path, [])) == 9
        assert files_below(tmp_path) == before

    def test_a_store_without_rows(self, tmp_path):
        build(tmp_path, EXAMPLES[:4])
        store = trackstar.delete_rows(tmp_path, range(4))
        assert len(store) == 0
        with pytest.raises(ValueError, match="has no rows left"):
            score_rows(store, torch.ones(1, *store.row_shape), k=1)

    def test_by_id(self, tmp_path):
        examples = [{**example, "id": f"doc-{i // 2}"} for i, example in enumerate(EXAMPLES)]
        store = build(tmp_path, examples)
        assert store.indices_of(["doc-1", "doc-5"]) == [2, 3, 10]
        store = trackstar.delete_rows(tmp_path, [2])
        assert store.indices_of({"doc-1"}) == [3]
        with pytest.raises(ValueError, match=r"ids must be of rows of .*, got 'doc-9'"):
            store.indices_of(["doc-0", "doc-9"])

    @pytest.mark.parametrize(
        ("indices", "error", "message"),
        [
            ([11], ValueError, "indices must be from 0 to 10, got 11"),
            ([-1], ValueError, "indices must be from 0 to 10, got -1"),
            ([1.0], TypeError, r"indices must be ints, got 1\.0"),
            ([True], TypeError, "indices must be ints, got True"),
        ],
    )
    def test_bad_indices(self, tmp_path, indices, error, message):
        build(tmp_path)
        with pytest.raises(error, match=message):
            trackstar.delete_rows(tmp_path, indices)
        assert len(trackstar.open_store(tmp_path)) == 11


class TestMerge:
    @pytest.mark.parametrize("linked", [True, False])
    def test_the_rows_of_each_follow(self, tmp_path, monkeypatch, first, linked):
        if not linked:

            def refuse(*arguments):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

            monkeypatch.setattr(os, "link", refuse)
        second = build(tmp_path / "second", EXAMPLES[7:], curvature=first.curvature, shard_rows=2)
        trackstar.delete_rows(second.path, [1])
        merged = trackstar.merge_stores(tmp_path / "merged", [first.path, second.path, first.path])
        assert (len(merged), merged.end, merged.deleted.tolist()) == (17, 18, [8])
        expected = torch.cat([first.rows(0, 7), second.rows(0, 4), first.rows(0, 7)])
        expected[8] = 0
        assert torch.equal(merged.rows(0, 18), expected)
        assert_same_documents(merged, EXAMPLES[9:] + EXAMPLES[:7], first=9)
        assert [part["examples"] for part in merged.parts] == [7, 4, 7]
        assert trackstar.verify_store(merged) == []
        shared = (merged.path / "shards/0000000000-0000000003/rows/data.ninja").stat().st_nlink > 1
        assert shared == linked

    def test_a_merged_store_can_be_added_to(self, tmp_path, first):
        trackstar.merge_stores(tmp_path / "merged", [first.path])
        store = trackstar.append_store(tmp_path / "merged", tiny_model(), EXAMPLES[7:])
        assert len(store) == 11
        assert len(trackstar.open_store(first.path)) == 7
        assert trackstar.verify_store(first.path) == []

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"spec": SketchSpec(sketch=4, seed=1)}, "its spec.seed is 1 instead of 0"),
            ({"dtype": "float16"}, "its dtype is 'float16' instead of 'float32'"),
            ({"dtype": "int8", "wide": "float16"}, "its dtype is 'int8' instead of 'float32'"),
            ({}, "its R_train is another"),
        ],
    )
    def test_stores_that_differ(self, tmp_path, first, changes, message):
        other = build(tmp_path / "other", EXAMPLES[7:], **changes)
        with pytest.raises(StoreError, match=rf"other cannot be merged with .*: {message}"):
            trackstar.merge_stores(tmp_path / "merged", [first.path, other.path])
        assert not (tmp_path / "merged").exists()

    def test_stores_of_another_model(self, tmp_path, first):
        torch.manual_seed(5)
        model = make_llama(num_hidden_layers=1).eval()
        other = trackstar.build_store(
            tmp_path / "other", model, EXAMPLES[7:], spec=SPEC, dtype="float32", curvature=first.curvature
        )
        with pytest.raises(StoreError, match=r"its model.fingerprint is"):
            trackstar.merge_stores(tmp_path / "merged", [first.path, other.path])

    def test_no_stores(self, tmp_path, first):
        with pytest.raises(ValueError, match="paths must name at least one store, got none"):
            trackstar.merge_stores(tmp_path / "merged", [])
        with pytest.raises(FileNotFoundError, match="there is no store at"):
            trackstar.merge_stores(tmp_path / "merged", [first.path, tmp_path / "missing"])

    def test_a_merge_of_others_is_not_gone_on_with(self, tmp_path, first, whole):
        trackstar.merge_stores(tmp_path / "merged", [first.path])
        with pytest.raises(StoreError, match=r"was built with data\[0\].examples = 7, this build has 11"):
            trackstar.merge_stores(tmp_path / "merged", [whole.path])


CODINGS = [
    ("float32", None),
    ("float16", None),
    ("int8", None),
    ("int8", "float16"),
    ("int4", "float32"),
    ("sign", None),
]


class TestReencode:
    @pytest.mark.parametrize(("dtype", "wide"), CODINGS)
    def test_the_same_as_built_in_that_dtype(self, tmp_path, whole, dtype, wide):
        store = trackstar.reencode_store(whole.path, tmp_path / "new", dtype, wide=wide)
        direct = build(tmp_path / "direct", dtype=dtype, wide=wide, curvature=whole.curvature)
        assert store.identity == direct.identity
        assert torch.equal(store.curvature.whitener, direct.curvature.whitener)
        assert torch.equal(store.squared_norms, whole.squared_norms)
        # A code may round the other way where float32 differs in its last bits.
        allowed = {"float32": 3e-6, "float16": 5e-4, "int8": 5e-3, "int4": 0.05, "sign": 0.1}[wide or dtype]
        assert relative(store.rows(0, 11), direct.rows(0, 11)) < allowed
        assert_same_documents(store, EXAMPLES)
        assert trackstar.verify_store(store) == []

    def test_there_and_back(self, tmp_path, whole):
        narrow = trackstar.reencode_store(whole.path, tmp_path / "narrow", "int4", wide="float32")
        back = trackstar.reencode_store(narrow.path, tmp_path / "back", "float32")
        assert relative(back.rows(0, 11), whole.rows(0, 11)) < 1e-5
        assert torch.equal(back.squared_norms, whole.squared_norms)
        assert (narrow.identity["narrowed"], back.identity["narrowed"]) == (None, None)
        narrower = trackstar.reencode_store(narrow.path, tmp_path / "narrower", "int8")
        last = trackstar.reencode_store(narrower.path, tmp_path / "last", "float16")
        assert last.identity["narrowed"] == "int8"
        assert 1e-4 < relative(last.rows(0, 11), whole.rows(0, 11)) < 2e-2

    def test_deleted_rows_are_gone(self, tmp_path, whole):
        trackstar.merge_stores(tmp_path / "copy", [whole.path])
        trackstar.delete_rows(tmp_path / "copy", [2, 7])
        store = trackstar.reencode_store(tmp_path / "copy", tmp_path / "new", "int8")
        assert (len(store), store.end, store.deleted.tolist()) == (9, 11, [2, 7])
        shard = store.shards[0]
        assert shard.deleted.tolist() == [2]
        assert not shard.codes[2].any()
        assert shard.codes[1].any()

    def test_bad_input(self, tmp_path, whole):
        for dtype, wide in (("int3", None), ("float16", "float32"), ("int8", "int4")):
            with pytest.raises(ValueError, match=r"(dtype|wide) must be"):
                trackstar.reencode_store(whole.path, tmp_path / "new", dtype, wide=wide)
        with pytest.raises(FileNotFoundError, match="there is no store at"):
            trackstar.reencode_store(tmp_path / "missing", tmp_path / "new", "int8")
        with pytest.raises(StoreError, match=r"was built with dtype = 'float32', this build has 'int8'"):
            trackstar.reencode_store(whole.path, whole.path, "int8")
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "thesis.tex").write_text("mine")
        with pytest.raises(StoreError, match=r"holds 'thesis.tex' and no manifest.json"):
            trackstar.reencode_store(whole.path, tmp_path / "taken", "int8")

    def test_a_damaged_source_is_named_and_gone_on_from_once_repaired(self, tmp_path, whole):
        source = build(tmp_path / "source", curvature=whole.curvature).path
        file = source / "shards/0000000006-0000000009/rows/data.ninja"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(
            StoreError, match=r"0000000006-0000000009/rows/data.ninja does not match its checksum"
        ):
            trackstar.reencode_store(source, tmp_path / "new", "int8")
        begun = trackstar.open_store(tmp_path / "new")
        assert (begun.complete, len(begun)) == (False, 6)
        trackstar.repair_store(source, tiny_model(), EXAMPLES)
        store = trackstar.reencode_store(source, tmp_path / "new", "int8")
        direct = trackstar.reencode_store(whole.path, tmp_path / "direct", "int8")
        assert store.manifest == direct.manifest
        assert trackstar.verify_store(store) == []


class TestRewhiten:
    def test_by_the_r_train_of_another_store(self, tmp_path, first, whole):
        own = build(tmp_path / "own")
        assert relative(own.curvature.train, first.curvature.train) > 0.05
        store = trackstar.rewhiten_store(own.path, tmp_path / "new", curvature=first.curvature)
        assert store.manifest.curvature == first.manifest.curvature
        assert relative(store.rows(0, 11), whole.rows(0, 11)) < 1e-5
        torch.testing.assert_close(store.squared_norms, whole.squared_norms, rtol=1e-4, atol=0)
        merged = trackstar.merge_stores(tmp_path / "merged", [first.path, store.path])
        assert len(merged) == 18

    def test_by_the_r_train_of_its_own_rows(self, tmp_path, whole):
        """What a build would have estimated from all documents."""
        own = build(tmp_path / "own")
        store = trackstar.rewhiten_store(whole.path, tmp_path / "new")
        assert relative(store.curvature.train, own.curvature.train) < 1e-5
        assert relative(store.rows(0, 11), own.rows(0, 11)) < 1e-4
        rows = torch.randn(2, *own.row_shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(score_rows(store, rows, k=5)[1], score_rows(own, rows, k=5)[1])

    def test_deleted_rows_do_not_count(self, tmp_path, whole):
        trackstar.merge_stores(tmp_path / "copy", [whole.path])
        trackstar.delete_rows(tmp_path / "copy", range(7, 11))
        store = trackstar.rewhiten_store(tmp_path / "copy", tmp_path / "new")
        expected = build(tmp_path / "own", EXAMPLES[:7])
        assert relative(store.curvature.train, expected.curvature.train) < 1e-5
        assert store.deleted.tolist() == [7, 8, 9, 10]

    @pytest.mark.parametrize(("dtype", "wide"), [("float16", None), ("int8", None), ("sign", "float32")])
    def test_other_dtypes(self, tmp_path, whole, dtype, wide):
        source = trackstar.reencode_store(whole.path, tmp_path / "source", dtype, wide=wide)
        store = trackstar.rewhiten_store(source.path, tmp_path / "new")
        direct = build(tmp_path / "direct", dtype=dtype, wide=wide)
        assert store.layout == direct.layout
        limit = {"float16": 2e-3, "int8": 2e-2, "float32": 1e-3}[wide or dtype]
        assert relative(store.rows(0, 11), direct.rows(0, 11)) < limit

    def test_a_curvature_of_another_shape(self, tmp_path, whole):
        other = build(tmp_path / "other", EXAMPLES[:4], spec=SketchSpec(sketch=3))
        with pytest.raises(ValueError, match=r"curvature must have shape \(7, 16, 16\), got \(7, 9, 9\)"):
            trackstar.rewhiten_store(whole.path, tmp_path / "new", curvature=other.curvature)
        with pytest.raises(ValueError, match=r"curvature must have shape \(7, 16, 16\), got \(7, 9, 9\)"):
            build(tmp_path / "new", curvature=other.curvature)


class TestRepair:
    def test_only_what_is_damaged_is_rebuilt(self, tmp_path):
        build(tmp_path, EXAMPLES[:7])
        trackstar.append_store(tmp_path, tiny_model(), EXAMPLES[7:])
        before = files_below(tmp_path)
        (tmp_path / "shards/0000000003-0000000006/rows/data.ninja").write_bytes(b"")
        (tmp_path / "shards/0000000007-0000000010/strings/data.ninja").unlink()
        rebuilt = trackstar.repair_store(tmp_path, tiny_model(), EXAMPLES)
        assert rebuilt == ["shards/0000000003-0000000006", "shards/0000000007-0000000010"]
        assert files_below(tmp_path) == before
        assert trackstar.repair_store(tmp_path, tiny_model(), []) == []

    def test_other_documents_do_not_take_their_place(self, tmp_path):
        build(tmp_path)
        file = tmp_path / "shards/0000000003-0000000006/rows/data.ninja"
        file.write_bytes(b"damaged")
        before = files_below(tmp_path)
        with pytest.raises(StoreError, match="0000000003-0000000006 cannot be rebuilt"):
            trackstar.repair_store(tmp_path, tiny_model(), EXAMPLES[::-1])
        with pytest.raises(ValueError, match="examples must be the store's 11, got 10"):
            trackstar.repair_store(tmp_path, tiny_model(), EXAMPLES[1:])
        assert files_below(tmp_path) == before


class TestVerify:
    def test_a_sample_reads_a_part(self, tmp_path):
        build(tmp_path, shard_rows=1)
        damaged = {f"{i:010d}-{i + 1:010d}" for i in range(0, 11, 2)}
        for name in damaged:
            (tmp_path / "shards" / name / "rows/data.ninja").unlink()
        assert len(trackstar.verify_store(tmp_path)) == 6
        found = [trackstar.verify_store(tmp_path, sample=0.3, seed=seed) for seed in range(20)]
        assert all(len(lines) <= 4 for lines in found)
        assert len({tuple(lines) for lines in found}) > 1
        assert found[3] == trackstar.verify_store(tmp_path, sample=0.3, seed=3)
        assert {line.split("/")[1] for lines in found for line in lines} == damaged

    def test_bad_input(self, tmp_path):
        build(tmp_path)
        for sample in (0, 1.5, True, "all"):
            with pytest.raises(ValueError, match=r"sample must be a number with 0 < sample ≤ 1"):
                trackstar.verify_store(tmp_path, sample=sample)


@pytest.mark.parametrize("work", ["append", "delete", "merge", "reencode", "rewhiten"])
def test_an_incomplete_store_is_refused(tmp_path, work, monkeypatch):
    from trackstar.storage import build as module

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_shard", stop)
        build(tmp_path / "store")
    path, out = tmp_path / "store", tmp_path / "out"
    call = {
        "append": lambda: trackstar.append_store(path, tiny_model(), EXAMPLES),
        "delete": lambda: trackstar.delete_rows(path, [0]),
        "merge": lambda: trackstar.merge_stores(out, [path]),
        "reencode": lambda: trackstar.reencode_store(path, out, "int8"),
        "rewhiten": lambda: trackstar.rewhiten_store(path, out),
    }[work]
    with pytest.raises(StoreError, match=r"the store at .* is not complete: run its build again"):
        call()
    assert not out.exists()


@pytest.mark.parametrize("work", ["append", "merge", "reencode", "rewhiten"])
def test_not_enough_disk_is_said_before_anything_is_written(tmp_path, monkeypatch, work):
    path, out = build(tmp_path / "store", EXAMPLES[:7]).path, tmp_path / "out"
    before = files_below(tmp_path)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    if work == "merge":
        # Shards on another disk are copied.
        monkeypatch.setattr("trackstar.storage.merge._bytes_to_copy", lambda *arguments: 1 << 20)
    call = {
        "append": lambda: trackstar.append_store(path, tiny_model(), EXAMPLES[7:]),
        "merge": lambda: trackstar.merge_stores(out, [path]),
        "reencode": lambda: trackstar.reencode_store(path, out, "int8"),
        "rewhiten": lambda: trackstar.rewhiten_store(path, out),
    }[work]
    with pytest.raises(OSError, match=r"needs [\d.,]+ MB of disk, 0\.0 MB are free") as caught:
        call()
    assert caught.value.errno == errno.ENOSPC
    after = {name: content for name, content in files_below(tmp_path).items() if not name.startswith("out/")}
    assert after == before
    assert {name for name in files_below(tmp_path) if name.startswith("out/")} <= {
        "out/lock",
        "out/manifest.json",
    }
