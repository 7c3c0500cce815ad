"""What other tools read and write: Parquet, Arrow, numpy arrays, and the viewer's JSONL."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import files_below
from synthetic import make_store
from trackstar import Result, delete_rows, export_rows, read_jsonl_results
from trackstar.exchange.viewer import Passages
from typer.testing import CliRunner


@pytest.fixture
def store(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shards = [torch.randn(n, 3, 16, generator=generator) for n in (7, 5)]
    make_store(
        tmp_path / "store", shards, dtype="int8", metadata=lambda i: json.dumps({"i": i}) if i % 2 else ""
    )
    return delete_rows(tmp_path / "store", [2, 9])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".npy"])
@pytest.mark.parametrize("batch", [1, 4 * 3 * 16 * 3, 1 << 20])
def test_rows_come_back(store, tmp_path, dtype, suffix, batch, monkeypatch):
    """From batches of one row, of three, and of whole shards."""
    monkeypatch.setattr("trackstar.exchange.export.BATCH", batch)
    path = tmp_path / "new" / f"rows{suffix}"
    assert export_rows(store, path, dtype=dtype) == 10
    kept = [i for i in range(12) if i not in (2, 9)]
    wanted = store.to_numpy()[kept].astype(dtype)
    assert files_below(path.parent).keys() == {path.name}
    if suffix == ".npy":
        assert np.array_equal(np.load(path), wanted)
        return
    if suffix == ".parquet":
        table = pq.read_table(path)
    else:
        with pa.ipc.open_file(str(path)) as file:
            table = file.read_all()
    assert table.schema.metadata[b"trackstar.row_shape"] == b"3,16"
    rows = np.stack(table["row"].to_numpy(zero_copy_only=False)).reshape(10, 3, 16)
    assert rows.dtype == dtype
    assert np.array_equal(rows, wanted)
    assert table["index"].to_pylist() == kept
    assert table["id"].to_pylist() == [str(i) for i in kept]
    assert table["text"].to_pylist() == [f"text {i}" for i in kept]
    assert table["metadata"].to_pylist() == [json.dumps({"i": i}) if i % 2 else None for i in kept]


def test_an_export_that_fails_leaves_what_was_there(store, tmp_path, monkeypatch):
    path = tmp_path / "out" / "rows.parquet"
    path.parent.mkdir()
    path.write_text("what was there")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("trackstar.storage.store.Store.text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_rows(store, path)
    assert files_below(path.parent) == {"rows.parquet": b"what was there"}
    with pytest.raises(ValueError, match=r"path must end with .parquet, .arrow, .npy; got 'rows.csv'"):
        export_rows(store, tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="dtype must be one of float32, float16; got 'int8'"):
        export_rows(store, path, dtype="int8")


def a_line(**changes):
    line = {
        "example_id": "q",
        "query_set": "queries",
        "inputs_plaintext": "the capital of Peru is",
        "targets_plaintext": " Lima",
        "proponents": ["Lima is", "é \n"],
        "proponent_ids": ["a", "b"],
        "proponent_scores": [0.5, -0.25],
    }
    return {key: value for key, value in (line | changes).items() if value is not None}


def write_lines(path, *lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


OPPONENTS = {"opponents": ["Oslo", "Lima is"], "opponent_ids": ["c", "a"], "opponent_scores": [-0.5, 0.125]}


@pytest.mark.parametrize("more", [{}, OPPONENTS])
def test_results_go_round(tmp_path, more):
    lines = [a_line(**more), a_line(example_id="r", proponents=["Oslo", "Lima is"], **more)]
    written = write_lines(tmp_path / "a.jsonl", *lines)
    result = read_jsonl_results(written)
    assert isinstance(result, Result)
    assert (result.method, result.mixing, result.largest) == ("viewer file", None, True)
    assert [query.id for query in result.queries] == ["q", "r"]
    assert result.scores.tolist() == [[0.5, -0.25]] * 2
    assert result.corpus.text(result.indices[1, 0]) == "Oslo"
    assert (result.opponents is None) == (more == {})
    result.to_jsonl(tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == written.read_bytes()


def test_a_passage_is_kept_once():
    corpus = Passages()
    assert [corpus.add(*p) for p in (("a", "x"), ("b", "x"), ("a", "x"), ("a", "y"))] == [0, 1, 0, 2]
    assert len(corpus) == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "must hold at least one result, it is empty"),
        ([a_line(), ["a"]], "line 2 of .* is no result: it is not a JSON object"),
        ([a_line(proponent_ids=None)], "line 1 of .* is no result: it has no field 'proponent_ids'"),
        ([a_line(proponent_ids=["a"])], "2 proponents with 1 ids and 2 scores"),
        ([a_line(proponent_scores=["x", 1])], "could not convert"),
        ([a_line(targets_plaintext=3)], "3 is not a string"),
        ([a_line(), a_line(proponents=[], proponent_ids=[], proponent_scores=[])], r"got \[0, 2\]"),
        ([a_line(), a_line(**OPPONENTS)], "as many opponents as the others"),
    ],
)
def test_files_that_hold_no_results(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_jsonl_results(write_lines(tmp_path / "a.jsonl", *lines))


def test_commands(store, tmp_path):
    from trackstar.cli import app

    runner = CliRunner()
    done = runner.invoke(app, ["export", str(store.path), "--out", str(tmp_path / "rows.npy")])
    assert done.exit_code == 0, done.output
    assert done.output.endswith("rows.npy: 10 rows\n")
    shown = runner.invoke(app, ["show", str(write_lines(tmp_path / "a.jsonl", a_line(**OPPONENTS)))])
    assert shown.exit_code == 0, shown.output
    assert "viewer file, opponents" in shown.output
    np.load(tmp_path / "rows.npy").reshape(-1, 48).astype(np.float32).tofile(tmp_path / "gradients.bin")
    info = {"num_grads": 10, "grad_sizes": {"a": 16, "b": 32}, "base_dtype": "float32"}
    (tmp_path / "info.json").write_text(json.dumps(info))
    write_lines(tmp_path / "data.jsonl", *({"id": f"d{i}"} for i in range(10)))
    arguments = [
        "import",
        str(tmp_path),
        "--out",
        str(tmp_path / "s"),
        "--data",
        str(tmp_path / "data.jsonl"),
    ]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "10 rows of 2×32 float16" in done.output
