"""Stores made up or spoilt at random: whatever they hold, the worst that comes of reading them is a StoreError.

Damage is found by checksums, so most of these stores have right ones, made anew over wrong contents.
"""

import contextlib
import json
import os
import shutil

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import trackstar
import xxhash
from hypothesis import HealthCheck, given, settings
from killable import SPEC, documents, tiny_model
from safetensors.torch import load_file, save_file
from trackstar import SecondMoments, StoreError
from trackstar.scoring.attribution import score_rows
from trackstar.storage.manifest import Manifest

pytestmark = pytest.mark.usefixtures("unsynced")

FUZZ = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A store with every kind of file: an index, deletions, scales, a wider copy, a correction."""
    path = tmp_path_factory.mktemp("sound") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr("trackstar.storage.index.SEGMENT", 2)
        correction = SecondMoments.estimate(tiny_model(), documents(2, 3)).correction("rank")
        arguments = {
            "spec": SPEC,
            "shard_rows": 2,
            "dtype": "int4",
            "wide": "float16",
            "correction": correction,
        }
        trackstar.build_store(path, tiny_model(), documents(7, 0), **arguments)
        trackstar.delete_rows(path, [1, 6])
    return path


def use(path):
    """Read everything that a store offers."""
    store = trackstar.open_store(path)
    trackstar.verify_store(store)
    assert repr(store)
    assert len(store.parts) <= store.end
    assert len(store.squared_norms) == len(store.rows(0, store.end)) == store.end
    for shard in store.shards:
        for index in (shard.start + shard.live).tolist():
            for read in (store.text, store.id, store.tokens, store.metadata):
                read(index)
        for name in ("codes", "scales", "wide"):
            getattr(shard, name)
    for name in ("spec", "correction", "curvature"):
        getattr(store, name)
    rows = torch.ones(1, *store.row_shape)
    if store.complete and len(store):
        score_rows(store, rows, k=1, mixing=0.5)


def survives(path):
    """Whether a store can be used; that or a StoreError."""
    with contextlib.suppress(StoreError, FileNotFoundError):
        use(path)
        return True
    return False


def write_manifest(path, content):
    text = json.dumps(content, separators=(",", ":")).encode()
    head = b'{"format":4,"xxh3":"%s","content":' % xxhash.xxh3_128_hexdigest(text).encode()
    (path / "manifest.json").write_bytes(head + text + b"}\n")


def nodes(tree, path=()):
    """Paths to every value of a JSON tree."""
    yield path
    for key, value in (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    ):
        yield from nodes(value, (*path, key))


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def changed(tree, path, value):
    """The tree with another value at ``path``."""
    if not path:
        return value
    tree = json.loads(json.dumps(tree))
    at(tree, path[:-1])[path[-1]] = value
    return tree


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 12)
    | st.floats()
    | st.sampled_from(["float16", "int8", "sign", "module", "0" * 32, "../../etc/passwd", "\ud800", "\0", ""])
    | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children, max_size=3)
    ),
    max_leaves=6,
)


def test_the_sound_store_is_one(sound, monkeypatch):
    monkeypatch.setattr("trackstar.storage.index.SEGMENT", 2)
    assert survives(sound)
    manifest = Manifest.read(sound)
    assert manifest.segments
    assert manifest.deletions
    assert manifest.correction


@FUZZ
@given(content=st.binary(max_size=300) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_anything_as_a_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError):
        trackstar.open_store(tmp_path)


@FUZZ
@given(content=st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_anything_as_a_manifest_with_a_right_checksum(tmp_path, content):
    digest = xxhash.xxh3_128_hexdigest(content).encode()
    (tmp_path / "manifest.json").write_bytes(b'{"format":4,"xxh3":"%s","content":%s}\n' % (digest, content))
    assert not survives(tmp_path)


@pytest.mark.parametrize("depth", [10, 100_000])
def test_a_manifest_of_brackets(tmp_path, depth):
    for text in (b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth):
        test_anything_as_a_manifest_with_a_right_checksum.hypothesis.inner_test(tmp_path, text)


@FUZZ
@given(data=st.data())
def test_a_manifest_of_which_one_value_is_another(sound, monkeypatch, data):
    monkeypatch.setattr("trackstar.storage.index.SEGMENT", 2)
    original = (sound / "manifest.json").read_bytes()
    content = json.loads(original)["content"]
    where = data.draw(st.sampled_from([path for path in nodes(content) if path]))
    value = data.draw(VALUES)
    try:
        write_manifest(sound, changed(content, where, value))
        survives(sound)
    finally:
        (sound / "manifest.json").write_bytes(original)


def seal_again(folder):
    """Checksums over whatever a sealed folder holds now."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "checksums.json")
    records = {
        file.relative_to(folder).as_posix(): [
            file.stat().st_size,
            xxhash.xxh3_128_hexdigest(file.read_bytes()),
        ]
        for file in files
    }
    (folder / "checksums.json").write_text(json.dumps(records))


def trust(root):
    """A manifest and index that vouch for what the folders of a store hold now."""
    content = json.loads((root / "manifest.json").read_bytes())["content"]

    def sealed(name):
        text = (root / name / "checksums.json").read_bytes()
        return [
            sum(size for size, _ in json.loads(text).values()) + len(text),
            xxhash.xxh3_128_hexdigest(text),
        ]

    for field in ("correction", "curvature"):
        content[field] = sealed(field)
    names = sorted(f"shards/{folder.name}" for folder in (root / "shards").iterdir())
    listed = [[int(name[-10:]), *sealed(name)] for name in names]
    content["segments"], content["shards"] = [], listed
    for number, entry in enumerate(content["deletions"]):
        entry[1:] = sealed(f"deletions/{number:08d}")
    write_manifest(root, content)


@pytest.mark.parametrize("field", ["row_shape", "total", "finished"])
@pytest.mark.parametrize("number", [2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**70, 0, -1, True, 1.0])
def test_numbers_beyond_reason(sound, tmp_path, field, number):
    shutil.copytree(sound, tmp_path / "store")
    content = json.loads((sound / "manifest.json").read_bytes())["content"]
    for path in (path for path in nodes(content) if path and path[0] == field and path != ("row_shape",)):
        write_manifest(tmp_path / "store", changed(content, path, number))
        assert not survives(tmp_path / "store")


@FUZZ
@given(data=st.data())
def test_files_that_hold_anything_under_right_checksums(sound, tmp_path, data):
    root = tmp_path / "store"
    if root.exists():
        shutil.rmtree(root)
    shutil.copytree(sound, root)
    folders = [
        root / "curvature",
        root / "correction",
        root / "deletions/00000000",
        *(root / "shards").iterdir(),
    ]
    folder = data.draw(st.sampled_from(sorted(folders)))
    file = data.draw(st.sampled_from(sorted(file for file in folder.rglob("*") if file.is_file())))
    content = bytearray(file.read_bytes())
    how = data.draw(st.sampled_from(["flip", "cut", "grow", "replace", "remove"]))
    if how == "flip":
        for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
            content[position] = data.draw(st.integers(0, 255))
    elif how == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif how == "grow":
        content += data.draw(st.binary(min_size=1, max_size=40))
    else:
        content = data.draw(st.binary(max_size=60))
    file.write_bytes(content)
    if how == "remove":
        file.unlink()
    if file.name != "checksums.json":
        seal_again(folder)
    with contextlib.suppress(ValueError, TypeError, AttributeError, FileNotFoundError):
        trust(root)
    survives(root)


@pytest.mark.parametrize("dtype", ["object", "O", "void", "float64", "str", "uint8\n", "i1,i1", "float16"])
def test_a_dtype_of_ones_own(sound, tmp_path, dtype):
    """numpy's object dtype holds pointers: it is never mapped."""
    shutil.copytree(sound, tmp_path / "store")
    folder = tmp_path / "store" / "shards/0000000002-0000000004"
    (folder / "rows/dtype.ninja").write_text(dtype)
    seal_again(folder)
    trust(tmp_path / "store")
    store = trackstar.open_store(tmp_path / "store")
    with pytest.raises(StoreError, match=r"rows is not an array of uint8 of shape"):
        store.shards[1].codes  # noqa: B018


@pytest.mark.parametrize("name", ["../../outside", "/outside", "rows/../../../outside"])
def test_checksums_of_files_outside(sound, tmp_path, name):
    """No name leads out of a sealed folder."""
    shutil.copytree(sound, tmp_path / "store")
    folder = tmp_path / "store" / "shards/0000000002-0000000004"
    records = json.loads((folder / "checksums.json").read_text())
    (folder / "checksums.json").write_text(json.dumps(records | {name: [1, "0" * 32]}))
    trust(tmp_path / "store")
    store = trackstar.open_store(tmp_path / "store")
    for reading in (lambda: store.rows(2, 3), lambda: trackstar.merge_stores(tmp_path / "new", [store.path])):
        with pytest.raises(StoreError, match=r"checksums.json is not a list of checksums"):
            reading()


# ---- Files that are sound arrays, under right checksums, of numbers that lie -------------------------------

SHARD = "shards/0000000002-0000000004"
CORRECTION = "correction/correction.safetensors"
QUERY = [{"input_ids": [3, 5, 7, 11], "labels": [-100, -100, 7, 11]}]

WAYS = {
    "reading": lambda root: use(root),
    "asking": lambda root: trackstar.attribute(trackstar.open_store(root), tiny_model(), QUERY, k=2),
    "exporting": lambda root: trackstar.export_rows(trackstar.open_store(root), root / "rows.parquet"),
    "deleting": lambda root: trackstar.delete_rows(root, [0]),
    "appending": lambda root: trackstar.append_store(root, tiny_model(), documents(2, 9)),
    "merging": lambda root: use(trackstar.merge_stores(root / "new", [root]).path),
    "re-encoding": lambda root: use(trackstar.reencode_store(root, root / "new", "int8").path),
    "re-whitening": lambda root: use(trackstar.rewhiten_store(root, root / "new").path),
    "with a companion": lambda root: trackstar.companion_store(
        trackstar.open_store(root), tiny_model(), "dot", path=root / "new"
    ),
}
"""What is done with a store, given its folder."""


def spoilt(place, value):
    """A lie: a number of an array is another."""

    def lie(array):
        array[place] = value

    return lie


LIES = {
    "offsets before the first token": (f"{SHARD}/offsets", spoilt((0, 0), -1)),
    "offsets beyond the last token": (f"{SHARD}/offsets", spoilt((2, 0), 2**40)),
    "offsets that descend": (f"{SHARD}/offsets", spoilt((1, 0), 2**62)),
    "an id before the first letter": (f"{SHARD}/offsets", spoilt((0, 1), -(2**63))),
    "a text beyond the last letter": (f"{SHARD}/offsets", spoilt((1, 2), 2**63 - 1)),
    "metadata that is none": (f"{SHARD}/offsets", spoilt((0, 3), 0)),
    "letters that are none": (f"{SHARD}/strings", spoilt(slice(None), 0xFF)),
    "tokens of no vocabulary": (f"{SHARD}/tokens", spoilt(slice(None), 2**31 - 1)),
    "negative tokens": (f"{SHARD}/tokens", spoilt(0, -(2**31))),
    "NaN scales": (f"{SHARD}/scales", spoilt((0, 0), np.nan)),
    "infinite scales": (f"{SHARD}/scales", spoilt(slice(None), np.inf)),
    "negative scales": (f"{SHARD}/scales", spoilt(slice(None), -3e38)),
    "NaN norms": (f"{SHARD}/squared_norms", spoilt((1, 0), np.nan)),
    "negative norms": (f"{SHARD}/squared_norms", spoilt(slice(None), -1)),
    "codes that are none": (f"{SHARD}/rows", spoilt(slice(None), 0x88)),
    "a NaN wide copy": (f"{SHARD}/wide", spoilt(slice(None), np.nan)),
    "an infinite wide copy": (f"{SHARD}/wide", spoilt((0, 0), np.inf)),
    "the deletion of row -1": ("deletions/00000000/rows", spoilt(0, -1)),
    "the deletion of a row to come": ("deletions/00000000/rows", spoilt(1, 2**62)),
    "the deletion of one row twice": ("deletions/00000000/rows", spoilt(1, 1)),
    "a NaN whitener": ("curvature/whitener", spoilt((0, 0, 0), np.nan)),
    "an infinite R_train": ("curvature/train", spoilt((0, 0, 0), np.inf)),
    "a negative R_train": ("curvature/train", spoilt(slice(None), -1)),
    "NaN eigenvalues": ("curvature/eigenvalues", spoilt(slice(None), np.nan)),
    "negative eigenvalues": ("curvature/eigenvalues", spoilt(slice(None), -1)),
    "an infinite damping": ("curvature/damping", spoilt(0, -np.inf)),
}
"""{what is wrong: (array, what is done to it)}."""


def lie_in(root, array, lie):
    """Change an array of a store, and vouch for it."""
    folder = root / array
    dtype = (folder / "dtype.ninja").read_text()
    shape = np.frombuffer((folder / "shape.ninja").read_bytes(), "<u8")
    lie(np.memmap(folder / "data.ninja", dtype, "r+", shape=tuple(shape.tolist())))
    vouch(root, folder.parent)


def vouch(root, folder):
    seal_again(folder)
    trust(root)


def assert_ends_well(way, root, file):
    """A way of using a store works, or says which file is wrong, or that its examples are not those of the manifest."""
    try:
        WAYS[way](root)
    except StoreError as error:
        assert file in str(error) or "had labels of their own" in str(error)


@pytest.mark.parametrize(
    "way", ["reading", "asking", *(pytest.param(way, marks=pytest.mark.slow) for way in list(WAYS)[2:])]
)
@pytest.mark.parametrize(("array", "lie"), LIES.values(), ids=LIES)
def test_arrays_that_lie(sound, tmp_path, array, lie, way):
    shutil.copytree(sound, tmp_path / "store")
    lie_in(tmp_path / "store", array, lie)
    assert_ends_well(way, tmp_path / "store", array.rsplit("/", 1)[0])


CORRECTIONS = {
    "another kind": (lambda tensors: tensors, {"kind": "exact"}),
    "an unknown kind": (lambda tensors: tensors, {"kind": "\0"}),
    "no source": (lambda tensors: tensors, {"source": None}),
    "no tensors": (lambda tensors: {}, {}),
    "names without a part": (lambda tensors: {key.replace("/", ""): t for key, t in tensors.items()}, {}),
    "one factor of two": (lambda tensors: dict(list(tensors.items())[1:]), {}),
    "vectors": (lambda tensors: {key: t.flatten() for key, t in tensors.items()}, {}),
    "nothing in them": (lambda tensors: {key: t[:, :0].clone() for key, t in tensors.items()}, {}),
    "NaN": (lambda tensors: {key: t * torch.nan for key, t in tensors.items()}, {}),
    "whole numbers": (lambda tensors: {key: t.int() for key, t in tensors.items()}, {}),
    "factors of two ranks": (
        lambda tensors: {key: t.repeat(2, 1) if key.endswith("u") else t for key, t in tensors.items()},
        {},
    ),
}
"""{what a correction file holds: (its tensors from sound ones, changes of its metadata)}."""


@pytest.mark.parametrize("way", ["reading", "asking"])
@pytest.mark.parametrize(("tensors", "metadata"), CORRECTIONS.values(), ids=CORRECTIONS)
def test_corrections_that_lie(sound, tmp_path, tensors, metadata, way):
    root = tmp_path / "store"
    shutil.copytree(sound, root)
    file = root / CORRECTION
    metadata = {"kind": "rank", "source": "estimate"} | metadata
    kept = {key: value for key, value in metadata.items() if value is not None}
    save_file(tensors(load_file(file)), file, kept)
    vouch(root, file.parent)
    with pytest.raises(StoreError, match=CORRECTION):
        WAYS[way](root)


@pytest.mark.parametrize("count", [1, 3, 2**40])
def test_deletions_of_other_counts(sound, tmp_path, count):
    """The manifest and its folder disagree on how many rows were deleted."""
    root = tmp_path / "store"
    shutil.copytree(sound, root)
    content = json.loads((root / "manifest.json").read_bytes())["content"]
    content["deletions"][0][0] = count
    write_manifest(root, content)
    with pytest.raises(StoreError, match="deletions/00000000/rows is not an array of int64"):
        len(trackstar.open_store(root))


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
def test_shards_of_other_counts(sound, tmp_path, stop):
    """The manifest and a shard's arrays disagree on how many rows there are."""
    root = tmp_path / "store"
    shutil.copytree(sound, root)
    trust(root)
    content = json.loads((root / "manifest.json").read_bytes())["content"]
    shutil.move(root / SHARD, root / f"shards/0000000002-{stop:010d}")
    content["shards"][1][0] = stop
    write_manifest(root, content)
    assert not survives(root)


@settings(FUZZ, max_examples=15)
@given(data=st.data())
def test_a_companion_whose_manifest_is_another(sound, tmp_path, monkeypatch, data):
    """It is told that it cannot serve, or that it is damaged."""
    monkeypatch.setattr("trackstar.storage.index.SEGMENT", 2)
    root, other = sound, tmp_path / "companion"
    if other.exists():
        shutil.rmtree(other)
    shutil.copytree(sound, other)
    content = json.loads((other / "manifest.json").read_bytes())["content"]
    where = data.draw(st.sampled_from([path for path in nodes(content) if path]))
    write_manifest(other, changed(content, where, data.draw(VALUES)))
    with pytest.raises(StoreError, match=str(other)):
        trackstar.companion_store(trackstar.open_store(root), tiny_model(), "dot", path=other)
