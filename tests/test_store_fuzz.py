"""Stores made up or spoilt at random: whatever they hold, the worst that comes of reading them is a StoreError.

Damage is found by checksums, so most of these stores have right ones, made anew over wrong contents.
"""

import contextlib
import json
import os
import shutil

import hypothesis.strategies as st
import pytest
import torch
import trackstar
import xxhash
from hypothesis import HealthCheck, given, settings
from killable import SPEC, documents, tiny_model
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
    head = b'{"format":2,"xxh3":"%s","content":' % xxhash.xxh3_128_hexdigest(text).encode()
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
    (tmp_path / "manifest.json").write_bytes(b'{"format":2,"xxh3":"%s","content":%s}\n' % (digest, content))
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
