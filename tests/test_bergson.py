"""Indexes of bergson, written here as bergson 2.5.1 and older versions lay them out."""

import json

import numpy as np
import pytest
import torch
import trackstar
from trackstar import StoreError, import_bergson, open_store, rows_from_bergson
from trackstar.curvature import estimate_curvature
from trackstar.scoring.attribution import score_rows

MODULES = {
    "model.layers.0.attn.q_proj": 16,
    "model.layers.0.mlp.up_proj": 16,
    "model.layers.1.mlp.up_proj": 16,
}


def write_index(path, rows, modules=None, dtype="float32", old=False, token_counts=None):
    """Rows (N, D) float32 as an index; ``token_counts`` of documents whose tokens' rows these are."""
    modules = MODULES if modules is None else modules
    path.mkdir(parents=True)
    if dtype == "bfloat16":
        numbers = torch.from_numpy(rows).bfloat16().view(torch.int16).numpy()
    else:
        numbers = rows.astype(dtype)
    numbers.tofile(path / "gradients.bin")
    info = {"num_grads": len(rows), "grad_sizes": modules}
    if old:
        formats = [f"({size},){'<f4' if dtype == 'float32' else '<f2'}" for size in modules.values()]
        info["dtype"] = {"names": list(modules), "formats": formats, "itemsize": 4 * sum(modules.values())}
    else:
        items = len(rows) if token_counts is None else len(token_counts)
        info |= {"attribute_tokens": token_counts is not None, "num_items": items, "base_dtype": dtype}
    if token_counts is not None:
        np.save(path / "offsets.npy", np.concatenate([[0], np.cumsum(token_counts)]))
    (path / "info.json").write_text(json.dumps(info, indent=2))
    return path


def draw(count, width=48, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("dtype", "old", "tolerance"),
    [
        ("float32", False, 0),
        ("float32", True, 0),
        ("float64", False, 0),
        ("float16", False, 2**-11),
        ("float16", True, 2**-11),
        ("bfloat16", False, 2**-8),
    ],
)
def test_rows_are_what_was_written(tmp_path, dtype, old, tolerance):
    rows = draw(9)
    index = rows_from_bergson(write_index(tmp_path / "i", rows, dtype=dtype, old=old))
    assert (len(index), index.row_shape, index.modules) == (9, (3, 16), MODULES)
    wanted = torch.from_numpy(rows).unflatten(1, (3, 16))[2:7]
    assert ((index.rows(2, 7) - wanted).abs() <= tolerance * wanted.abs()).all()
    assert index.rows(4, 4).shape == (0, 3, 16)
    with pytest.raises(IndexError, match="rows must lie within 0 to 9, got 3 to 10"):
        index.rows(3, 10)


def test_modules_of_different_sizes_end_with_zeros(tmp_path):
    rows = draw(5, 7)
    index = rows_from_bergson(write_index(tmp_path / "i", rows, {"a": 2, "b": 4, "c": 1}))
    found = index.rows(0, 5)
    assert found.shape == (5, 3, 4)
    assert torch.equal(found[:, 0, :2], torch.from_numpy(rows[:, :2]))
    assert torch.equal(found[:, 1], torch.from_numpy(rows[:, 2:6]))
    assert torch.equal(found[:, 2, :1], torch.from_numpy(rows[:, 6:]))
    assert found.abs().sum() == pytest.approx(np.abs(rows).sum(), rel=1e-6)


def test_tokens_are_summed_by_document(tmp_path):
    rows = draw(10)
    index = rows_from_bergson(write_index(tmp_path / "i", rows, token_counts=[3, 0, 5, 2]))
    assert len(index) == 4
    wanted = np.stack([rows[:3].sum(0), np.zeros(48), rows[3:8].sum(0), rows[8:].sum(0)])
    assert np.allclose(index.rows(0, 4).flatten(1), wanted, atol=1e-5)
    assert np.allclose(index.rows(2, 3).flatten(1), wanted[2:3], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_store_of_an_index_answers_rows_of_another(tmp_path, dtype):
    rows, queries = draw(70), draw(4, seed=1)
    write_index(tmp_path / "train", rows)
    asked = rows_from_bergson(write_index(tmp_path / "queries", queries)).rows(0, 4)
    documents = [{"id": f"doc-{i}", "text": f"text {i}", "metadata": {"i": i}} for i in range(70)]
    store = import_bergson(tmp_path / "train", tmp_path / "store", examples=documents, dtype=dtype)
    assert (len(store), store.row_shape, store.id(3), store.text(3)) == (70, (3, 16), "doc-3", "text 3")
    assert store.metadata(3) == {"i": 3}
    for mixing in (0, 0.9):
        scores, indices, _ = score_rows(store, asked, k=70, mixing=mixing)
        wanted = dense(torch.from_numpy(rows).unflatten(1, (3, 16)), asked, mixing)
        assert (scores.gather(1, indices.argsort(dim=1)) - wanted).abs().max() < (
            1e-5 if dtype == "float32" else 2e-3
        )
    again = import_bergson(tmp_path / "train", tmp_path / "store", examples=documents, dtype=dtype)
    assert len(again) == 70
    other = write_index(tmp_path / "other", draw(70, seed=5))
    with pytest.raises(StoreError, match=r"was built with model.fingerprint = .*: build into another folder"):
        import_bergson(other, tmp_path / "store", examples=documents, dtype=dtype)


def dense(rows, queries, mixing):
    curvature = estimate_curvature([rows], *rows.shape[1:])
    inner = square_y = square_q = 0.0
    for b in range(rows.shape[1]):
        x, q = rows[:, b].double(), queries[:, b].double()
        inverse = torch.linalg.inv(mixing * q.T @ q / len(q) + (1 - mixing) * curvature.train[b])
        inner = inner + q @ inverse @ x.T
        square_y = square_y + ((x @ inverse) * x).sum(1)
        square_q = square_q + ((q @ inverse) * q).sum(1)
    return inner / (square_q[:, None] * square_y).sqrt()


def test_a_store_of_an_index_knows_no_model(tmp_path, llama):
    store = import_bergson(write_index(tmp_path / "i", draw(20)), tmp_path / "s")
    with pytest.raises(StoreError, match="its class is 'bergson'"):
        trackstar.attribute(store, llama, [{"input_ids": [1, 2], "labels": [-100, 2]}], k=1)
    assert open_store(tmp_path / "s").complete


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_grads": 8}, r"gradients.bin must hold 8 rows of 48 numbers, 1536 bytes, .* it has 1728"),
        ({"base_dtype": "float16"}, "it has 1728"),
        ({"base_dtype": "int32"}, "describes no bergson index: it has no 'int32'"),
        ({"num_grads": "9"}, "'9' is not a number of at least 0"),
        ({"num_grads": None}, "None is not a number"),
        ({"grad_sizes": {}}, "names no module"),
        ({"grad_sizes": [16, 32]}, "no bergson index"),
        ({"grad_sizes": {"a": 0, "b": 48}}, "0 is not a number of at least 1"),
    ],
)
def test_an_info_that_does_not_fit_is_one_line(tmp_path, change, message):
    path = write_index(tmp_path / "i", draw(9))
    info = json.loads((path / "info.json").read_text()) | change
    (path / "info.json").write_text(json.dumps(info))
    with pytest.raises(StoreError, match=message) as caught:
        rows_from_bergson(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1]", '{"num_grads": 9', "null"])
def test_an_info_that_is_none(tmp_path, content):
    path = write_index(tmp_path / "i", draw(9))
    (path / "info.json").write_text(content)
    with pytest.raises(StoreError, match=r"info.json describes no bergson index: "):
        rows_from_bergson(path)


def test_files_that_are_cut_or_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no bergson index at"):
        rows_from_bergson(tmp_path)
    path = write_index(tmp_path / "i", draw(9), token_counts=[4, 5])
    content = (path / "gradients.bin").read_bytes()
    (path / "gradients.bin").write_bytes(content[:-1])
    with pytest.raises(StoreError, match="it has 1727"):
        rows_from_bergson(path)
    (path / "gradients.bin").write_bytes(content)
    np.save(path / "offsets.npy", np.array([0, 4, 8]))
    with pytest.raises(StoreError, match="does not divide the 9 rows of the index"):
        rows_from_bergson(path)
    (path / "offsets.npy").unlink()
    with pytest.raises(StoreError, match=r"offsets.npy cannot be read"):
        rows_from_bergson(path)
    (path / "gradients.bin").unlink()
    with pytest.raises(StoreError, match="it has 0"):
        rows_from_bergson(path)


def test_rows_that_cannot_be_imported(tmp_path):
    rows = draw(9)
    rows[4, 3] = np.nan
    with pytest.raises(FloatingPointError, match=r"row 4 of .* holds NaN or Inf"):
        import_bergson(write_index(tmp_path / "nan", rows), tmp_path / "s1")
    with pytest.raises(ValueError, match="examples must be the index's 9 documents, got 2"):
        import_bergson(write_index(tmp_path / "i", draw(9)), tmp_path / "s2", examples=[{}, {}])
    wide = write_index(tmp_path / "wide", draw(2, 9000), {"head": 9000})
    with pytest.raises(ValueError, match="at most 8192 numbers, got 9000 in 'head'"):
        import_bergson(wide, tmp_path / "s3")
