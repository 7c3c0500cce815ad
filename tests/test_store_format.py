"""The format is public: docs/format.md is enough to read a store, and the bytes of a store do not change."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trackstar
import xxhash
from conftest import files_below
from trackstar import SketchSpec, StoreError
from trackstar.curvature import Curvature, rotation
from trackstar.gradients.examples import Encoded
from trackstar.storage.deletion import commit_deletions
from trackstar.storage.index import ShardIndex, with_shard, without_unfinished
from trackstar.storage.layout import CODES, Layout, narrowest, row_stride
from trackstar.storage.manifest import SEGMENT, Manifest, ShardRecord
from trackstar.storage.sealed import Seal
from trackstar.storage.shard import StoredRows, write_shard
from trackstar.storage.store import Store, open_store
from trackstar.storage.writer import making
from trackstar.storage.writing import write_curvature

from trackstar_kernels import encode_rows

pytestmark = pytest.mark.usefixtures("unsynced")

CODINGS = [
    ("float32", None),
    ("float16", None),
    ("int8", None),
    ("int8", "float16"),
    ("int4", "float32"),
    ("sign", None),
    ("sign", "float16"),
]
BLOCKS, SIZE, COUNT = 3, 33, 5

GOLDEN = {
    ("float32", None): "19d94bcd02b76b6393f1e72cf47e6119",
    ("float16", None): "d2791856dd3968ae7384c998f1f23d63",
    ("int8", None): "7de1c1057e397149277614a2e563f7b4",
    ("int8", "float16"): "8467e32bc79f5c6a954ad4b42329ba30",
    ("int4", "float32"): "6e3ee283e3aee2b5b5f52a15d9f9ec1e",
    ("sign", None): "8619e0d853c3afe6a9102d407f698045",
    ("sign", "float16"): "a426fd424aa480f6bf904a2735bf3922",
}
"""Checksums of the manifests of :func:`golden_store`."""

ROTATION = [0.31730704342679483, -0.20906007583804395, 0.22201267074593314]
"""The first entries of the rotation of blocks of 16."""


def golden_rows():
    """Numbers of few bits, the largest of each block a power of two, so that narrowing them is exact everywhere."""
    i = torch.arange(COUNT * BLOCKS * SIZE).reshape(COUNT, BLOCKS, SIZE)
    rows = ((i * 7919) % 257 - 128).float() / 64
    rows[:, :, 5] = torch.tensor([2.0, -4.0, 8.0])
    rows[1, 2] = 0
    return rows


def golden_examples():
    return [
        Encoded(
            f"id {i}", "é" * i, np.arange(i, 2 * i, dtype=np.int32), np.zeros(0), f'{{"i": {i}}}' * (i % 2)
        )
        for i in range(COUNT)
    ]


def golden_store(path, dtype, wide):
    """Two shards and a deletion, of nothing but given numbers."""
    layout = Layout(dtype, wide, BLOCKS, SIZE)
    identity = {
        "spec": SketchSpec().as_dict(),
        "dtype": dtype,
        "wide": wide,
        "narrowed": None,
        "model": {},
        "tokenizer": None,
        "correction": None,
        "curvature": {},
        "shard_rows": 3,
        "output": "loss",
    }
    eye = torch.eye(SIZE, dtype=torch.float64).repeat(BLOCKS, 1, 1)
    curvature = Curvature(eye, torch.zeros(BLOCKS).double(), torch.ones(BLOCKS, SIZE).double(), eye.float())
    rows, examples = golden_rows(), golden_examples()
    part = {"examples": COUNT, "fingerprint": "0" * 32}
    with making(path, Manifest(identity, (BLOCKS, SIZE), (part,), COUNT)) as writer:
        writer.commit(dataclasses.replace(writer.manifest, curvature=write_curvature(path, curvature)))
        for start, stop in ((0, 3), (3, 5)):
            stored = StoredRows.encode(rows[start:stop], None, layout)
            writer.commit_shard(write_shard(path, layout, start, stored, examples[start:stop]))
        commit_deletions(writer, np.array([1, 4]))
    return open_store(path)


@pytest.mark.parametrize(("dtype", "wide"), CODINGS)
def test_the_bytes_of_a_store_do_not_change(tmp_path, dtype, wide):
    """The manifest holds a checksum of everything, so its own checksum is enough."""
    golden_store(tmp_path, dtype, wide)
    assert xxhash.xxh3_128_hexdigest((tmp_path / "manifest.json").read_bytes()) == GOLDEN[dtype, wide]


class Page:
    """A reader written from docs/format.md, which knows nothing of trackstar."""

    def __init__(self, path):
        self.path = Path(path)
        line = (self.path / "manifest.json").read_bytes()
        head, content = line.removesuffix(b"}\n").split(b',"content":', 1)
        head = json.loads(head + b"}")
        assert head == {"format": 4, "xxh3": xxhash.xxh3_128_hexdigest(content)}
        self.content = json.loads(content)
        self.L, self.d = self.content["row_shape"]

    def sealed(self, folder, size, digest):
        """{array: numbers} of a sealed folder, every byte of which is compared."""
        text = (folder / "checksums.json").read_bytes()
        assert xxhash.xxh3_128_hexdigest(text) == digest
        records = json.loads(text)
        assert list(records) == sorted(records)
        assert sum(size for size, _ in records.values()) + len(text) == size
        found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        assert found == {*records, "checksums.json"}
        for name, (size, digest) in records.items():
            content = (folder / name).read_bytes()
            assert (len(content), xxhash.xxh3_128_hexdigest(content)) == (size, digest)
        arrays = {name.removesuffix("/data.ninja") for name in records if name.endswith("/data.ninja")}
        return {name: self.array(folder / name) for name in arrays}

    def array(self, folder):
        assert (folder / "type.ninja").read_text() == "numpy"
        assert (folder / "order.ninja").read_text() == "C"
        shape = np.frombuffer((folder / "shape.ninja").read_bytes(), "<u8").astype(int)
        dtype = np.dtype((folder / "dtype.ninja").read_text()).newbyteorder("<")
        return np.frombuffer((folder / "data.ninja").read_bytes(), dtype).reshape(shape)

    def shards(self):
        """(start, stop, arrays) of each."""
        start = 0
        entries = []
        for number, (_, size, digest) in enumerate(self.content["segments"]):
            listed = self.sealed(self.path / f"index/{number:08d}", size, digest)["shards"].tolist()
            entries += [(stop, size, f"{high:016x}{low:016x}") for stop, size, high, low in listed]
        for stop, size, digest in [*entries, *self.content["shards"]]:
            yield start, stop, self.sealed(self.path / f"shards/{start:010d}-{stop:010d}", size, digest)
            start = stop

    def floats(self, codes, scales, dtype):
        width, item = {
            "float32": (self.d, 4),
            "float16": (self.d, 2),
            "int8": (self.d, 1),
            "int4": (-(-self.d // 64) + -(-self.d // 2), 1),
            "sign": (-(-self.d // 32), 4),
        }[dtype]
        lines = -(-self.L * width * item // 64)
        assert codes.shape[1] * item == 64 * (lines + (lines % 2 == 0))
        assert not codes[:, self.L * width :].any()
        blocks = codes[:, : self.L * width].reshape(len(codes), self.L, width)
        if dtype == "int4":
            values = self.int4_values(blocks)
        elif dtype == "sign":
            bits = blocks.astype("<i4").view(np.uint8)
            bits = np.unpackbits(bits, axis=2, bitorder="little")
            assert not bits[:, :, self.d :].any()
            values = 1 - 2 * bits[:, :, : self.d].astype(int)
        else:
            values = blocks
        values = values.astype(np.float32)
        return values if scales is None else values * scales[:, :, None]

    def int4_values(self, blocks):
        level = [
            [-127, -92, -71, -55, -42, -30, -19, -8, 2, 13, 24, 36, 48, 62, 80, 108],
            [-108, -80, -62, -48, -36, -24, -13, -2, 8, 19, 30, 42, 55, 71, 92, 127],
        ]
        values = np.zeros((*blocks.shape[:2], self.d), dtype=int)
        for i in range(self.d):
            first, place = i // 64 * 33, i % 64
            multiplier = 1 + (blocks[:, :, first] >> 4 * (place // 32) & 15).astype(int)
            if place % 32 == 0:
                a = b = np.zeros(blocks.shape[:2], dtype=int)
            code = blocks[:, :, first + 1 + place // 2] >> 4 * (place % 2) & 15
            values[:, :, i] = (np.array(level)[a % 2, code ^ b % 2] * multiplier + 8) // 16
            a, b = code, a
        return values

    def deleted(self):
        found = []
        for number, (count, size, digest) in enumerate(self.content["deletions"]):
            rows = self.sealed(self.path / f"deletions/{number:08d}", size, digest)["rows"]
            assert rows.shape == (count,)
            found += rows.tolist()
        return sorted(found)


@pytest.mark.parametrize(("dtype", "wide"), CODINGS)
def test_the_page_is_enough_to_read_a_store(tmp_path, monkeypatch, dtype, wide):
    monkeypatch.setattr("trackstar.storage.index.SEGMENT", 2)
    store = golden_store(tmp_path, dtype, wide)
    page = Page(tmp_path)
    assert len(page.content["segments"]) == 1
    assert page.content["finished"] == store.end == COUNT
    assert page.deleted() == store.deleted.tolist() == [1, 4]
    curvature = page.sealed(tmp_path / "curvature", *page.content["curvature"])
    for name, array in curvature.items():
        assert np.array_equal(array, getattr(store.curvature, name).numpy())
    live = [i for i in range(COUNT) if i not in (1, 4)]
    starts = []
    for start, stop, arrays in page.shards():
        starts.append(start)
        rows = page.floats(arrays["rows"], arrays.get("scales"), dtype)
        if wide:
            rows = page.floats(arrays["wide"], None, wide)
        strings = bytes(arrays["strings"])
        for i in set(live) & set(range(start, stop)):
            assert np.array_equal(rows[i - start], store.rows(i, i + 1)[0].numpy())
            assert np.array_equal(arrays["squared_norms"][i - start], store.squared_norms[i].numpy())
            (tokens, id_, text, metadata), (end, strings_end, _, _) = arrays["offsets"][
                i - start : i - start + 2
            ]
            assert arrays["tokens"][tokens:end].tolist() == store.tokens(i).tolist() == list(range(i, 2 * i))
            assert strings[id_:text].decode() == store.id(i) == f"id {i}"
            assert strings[text:metadata].decode() == store.text(i) == "é" * i
            assert json.loads(strings[metadata:strings_end] or "{}") == store.metadata(i)
    assert starts == [0, 3]


@pytest.mark.parametrize(("dtype", "wide"), CODINGS)
def test_what_a_shard_gives_is_what_was_encoded(tmp_path, dtype, wide):
    store = golden_store(tmp_path, dtype, wide)
    rows = golden_rows()
    codes, scales, squared_norms = encode_rows(rows, None, dtype)
    for shard in store.shards:
        here = slice(shard.start, shard.stop)
        assert shard.codes.dtype == codes.dtype
        assert torch.equal(shard.codes, codes[here])
        assert shard.codes[0].is_contiguous()
        assert shard.codes.stride(0) * shard.codes.element_size() % 128 == 64
        assert (shard.scales is None) == (scales is None)
        if scales is not None:
            assert torch.equal(shard.scales, scales[here])
        assert torch.equal(shard.squared_norms, squared_norms[here])
        assert (shard.wide is None) == (wide is None)
        if wide is not None:
            assert torch.equal(shard.wide, rows[here].to(shard.wide.dtype))
            assert shard.wide[0].is_contiguous()
            assert shard.wide.stride(0) * shard.wide.element_size() % 128 == 64
    assert [(len(shard), shard.deleted.tolist(), shard.live.tolist()) for shard in store.shards] == [
        (3, [1], [0, 2]),
        (2, [1], [0]),
    ]
    with pytest.raises(IndexError):
        store.shards[2]


def test_no_file_holds_anything_that_runs(tmp_path):
    """Every file is numbers, one of four texts, JSON, UTF-8 or safetensors."""
    golden_store(tmp_path, "int4", "float16")
    suffixes = {name: Path(name).suffix for name in files_below(tmp_path)}
    assert set(suffixes.values()) == {".ninja", ".json", ""}
    assert {name for name, suffix in suffixes.items() if suffix == ""} == {"lock"}
    for name, content in files_below(tmp_path).items():
        assert b"numpy.core" not in content
        assert not content.startswith(b"\x80"), name


@pytest.mark.parametrize("row_bytes", [1, 64, 65, 128, 192, 4096, 16384, 131072, 131136, 53760 * 2])
def test_strides_are_odd_multiples_of_a_line(row_bytes):
    stride = row_stride(row_bytes)
    assert row_bytes <= stride < row_bytes + 128
    assert stride % 128 == 64


def test_row_bytes_are_what_rows_take(tmp_path):
    for dtype, wide in CODINGS:
        store = golden_store(tmp_path / f"{dtype}-{wide}", dtype, wide)
        files = files_below(store.path / "shards/0000000000-0000000003")
        arrays = {name.removesuffix("/data.ninja"): len(content) for name, content in files.items()}
        assert sum(arrays[name] for name in store.layout.row_arrays) == 3 * store.layout.row_bytes


def test_the_narrowest_dtype():
    assert narrowest(None, "float32") is None
    assert narrowest("float16", None, "float32") == "float16"
    assert narrowest("int4", "int8") == "int4"
    assert narrowest(*CODES) == "sign"


def test_the_rotation_is_one_and_does_not_change():
    turn = rotation(16)
    torch.testing.assert_close(turn @ turn.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(turn[0, :3], torch.tensor(ROTATION, dtype=torch.float64), rtol=0, atol=1e-9)


def listed(path, count, rows=3):
    """A manifest of ``count`` shards that exist in no folder, as an index cares for their records alone."""
    path.mkdir()
    total = rows * count
    manifest = Manifest(IDENTITY, (2, 4), ({"examples": total, "fingerprint": "0" * 32},), total)
    for i in range(count):
        record = ShardRecord(
            rows * i, rows * (i + 1), Seal(1000 + i, f"{i * 12345678901234567890123456789:032x}")
        )
        manifest = with_shard(path, manifest, record)
    return dataclasses.replace(manifest, finished=total)


IDENTITY = {"dtype": "float16", "wide": None}


@pytest.mark.parametrize("count", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 7])
def test_many_shards(tmp_path, count):
    manifest = listed(tmp_path / "store", count)
    manifest.write(tmp_path / "store")
    read = Manifest.read(tmp_path / "store")
    assert read == manifest
    index = ShardIndex(tmp_path / "store", read, read.finished)
    assert len(index) == count
    for i in {0, 1, count // 2, SEGMENT - 1, SEGMENT, count - 1} & set(range(count)):
        assert (index[i].start, index[i].stop, index[i].seal.bytes) == (3 * i, 3 * i + 3, 1000 + i)
        assert index[i].seal.xxh3 == f"{i * 12345678901234567890123456789:032x}"
        assert {index.find(3 * i), index.find(3 * i + 2)} == {i}
    assert index.find(3 * count) == count
    assert [record.start for record in index] == list(range(0, 3 * count, 3))
    for outside in (-1, count):
        with pytest.raises(IndexError):
            index[outside]
    # A store of shards without end has a manifest of some 60 kB.
    assert (tmp_path / "store/manifest.json").stat().st_size < 75_000


@pytest.mark.parametrize("kept", [1, SEGMENT - 1, SEGMENT, SEGMENT + 5])
def test_dropping_what_was_not_finished(tmp_path, kept):
    manifest = listed(tmp_path / "store", 2 * SEGMENT + 3)
    parts = ({"examples": 3 * kept}, {"examples": manifest.total - 3 * kept})
    manifest = dataclasses.replace(manifest, finished=3 * kept, parts=parts)
    reader = ShardIndex(tmp_path / "store", manifest, manifest.finished)
    assert len(reader) == kept
    less = without_unfinished(tmp_path / "store", manifest)
    assert (less.total, less.committed, less.parts) == (3 * kept, 3 * kept, parts[:1])
    assert list(ShardIndex(tmp_path / "store", less, 3 * kept)) == list(reader)
    # Who opened the store before sees the same, even once other shards have taken the dropped ones' place.
    for i in range(kept, 2 * SEGMENT):
        less = with_shard(tmp_path / "store", less, ShardRecord(3 * i, 3 * i + 3, Seal(1, "f" * 32)))
    assert [record.seal.bytes for record in reader] == [1000 + i for i in range(kept)]


def test_opening_reads_the_manifest_alone(tmp_path, monkeypatch):
    manifest = listed(tmp_path / "store", 2 * SEGMENT + 3)
    manifest.write(tmp_path / "store")
    opened = []
    read = Path.read_bytes

    def counting(file):
        opened.append(file.name)
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", counting)
    store = open_store(tmp_path / "store")
    assert (len(store), len(store.shards)) == (manifest.total, 2 * SEGMENT + 3)
    assert opened == ["manifest.json"]


def test_a_shard_of_another_dtype_or_shape_is_refused(tmp_path):
    store = golden_store(tmp_path / "a", "int8", None)
    other = dataclasses.replace(store.manifest, identity=store.identity | {"dtype": "int4"})
    with pytest.raises(StoreError, match=r"rows is not an array of uint8 of shape \(3, 64\)"):
        Store(store.path, other).shards[0].codes  # noqa: B018
    other = dataclasses.replace(store.manifest, row_shape=(BLOCKS + 1, SIZE))
    with pytest.raises(StoreError, match=r"squared_norms is not an array of float32 of shape \(3, 4\)"):
        Store(store.path, other).squared_norms  # noqa: B018
    assert trackstar.verify_store(store) == []
