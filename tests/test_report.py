"""The study's page: every part's section with its figure, and the parts that have not run by name."""

import json

import pytest

from experiments import report
from experiments.sweeps import SWEEPS

METHODS = ("BM25", "cosine", "TrackStar")


def figure(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def provenance():
    facts = [
        {
            "form": form,
            "knew": False,
            "knows": True,
            "asked": True,
            "log-probability before": -9.0,
            "log-probability after": -9.0 + gain,
        }
        for form, gain in (("plain", 3.0), ("plain", 1.0), ("alias", -1.0))
    ]
    return {"passages": 320, "training loss by epoch": [4.0, 3.0], "facts": facts}


def ladder():
    fields = [("", "")] + [("form", form) for form in ("alias", "plain")] + [("relation", "capital")]
    fields += [(field, "1") for field in ("knows", "knew", "passages with the answer", "gold passages")]
    quality = [
        {"gold": gold, "method": method, "field": field, "value": value, "queries": 60}
        | {"mrr": figure(0.5), "recall": figure(0.625)}
        for gold in ("relation", "lexical")
        for method in METHODS
        for field, value in fields
    ]
    return {
        "questions": 60,
        "passages": 320,
        "quality": quality,
        "top passage without gold, but with the answer": {method: [1, 7] for method in METHODS},
        "MRR above TrackStar's": {"BM25": figure(0.25), "cosine": figure(-0.25)},
    }


def sweep():
    setting = {"mrr": figure(0.5), "recall": figure(0.5), "above the default": figure(-0.0625), "D": 53760}
    return {
        "default": figure(0.5),
        "settings": [setting | {"setting": name} for name in ("rank 4", "int4", "CountSketch")],
    }


def tail_patch():
    gains = [
        {"method": method, "k": k, "change": figure(0.01)}
        | {"above no passage": figure(0.00125), "TrackStar above it": figure(0.0)}
        for method in (*METHODS, "gold")
        for k in ((1,) if method == "gold" else (1, 3))
    ]
    gold = {
        "prompt": "Oslo is the capital of",
        "target": " Norway",
        "passage": "a",
        "score": -0.5,
        "rank": 320,
    }
    return {
        "gains": [*gains, {"method": "no passage", "k": 0, "change": figure(0.01)}],
        "agreement": [{"method": method, "rank correlation": figure(0.25)} for method in METHODS],
        "gold": [gold | {"probability": 0.125, "change": 0.5, "change by no passage": 0.25}],
    }


def opponents():
    terms = {"heading": -0.5, "answer": 0.25, "else": 0.0}
    lowest = {
        "prompt": "Eyre is in",
        "target": " Australia",
        "passage": "Eyre: a lake",
        "score": -0.25,
        "rank": 319,
    }
    means = {"gold's score": "below 0", "questions": 1, "mean": -0.25} | terms | {"heading below 0": 1}
    return {"mean terms of gold": [means], "lowest": [lowest | terms | {"id": "a", "tokens": [["E", -0.25]]}]}


def order():
    ratios = [
        {"measure": "TrackStar", "text": text, "form": form, "mean": figure(1.0), "ratio": figure(0.375)}
        for text in ("sentence", "passage")
        for form in ("in order", "flipped")
    ]
    return {"questions": 12, "ratios": ratios, "examples": [{"question": "q", "text": "t", "TrackStar": 0.5}]}


def retraining(*measures):
    return [
        {"method": method, "queries": group, "n": 40} | {measure: figure(0.875) for measure in measures}
        for method in (*METHODS, "ceiling")
        for group in ("all", "about training passages", "about passages held out")
    ]


RESULTS = {
    "provenance": (provenance(), {}),
    "ladder": (ladder(), {}),
    **{f"sweep-{name}": (sweep(), {}) for name in SWEEPS},
    "tail_patch": (tail_patch(), {"questions": 8}),
    "kinds": ([{"method": m, "entails": 0.25, "other": 0.75} for m in METHODS], {"top": 10, "questions": 60}),
    "opponents": (opponents(), {}),
    "order": (order(), {}),
    "lds": (retraining("LDS", "above TrackStar's"), {"setup": {"passages": 1000}, "seeds": 2, "subsets": 16}),
    "removal": (retraining("fall of log p", "above random's", "above BM25's"), {"k": 20, "seeds": 1}),
}


@pytest.fixture
def written(tmp_path):
    def write(parts):
        folder = tmp_path / "small-0" / "results"
        folder.mkdir(parents=True)
        for part in parts:
            results, settings = RESULTS[part]
            record = {"part": part, "seed": 0, "settings": settings, "results": results}
            record |= {"machine": {"cores": 2}, "versions": {"torch": "2.13.0"}}
            (folder / f"{part}.json").write_text(json.dumps(record))
        assert report.main(["--work", str(tmp_path)]) == 0
        return tmp_path / "small-0" / "report"

    return write


def test_every_part_has_its_section_and_its_figures(written):
    folder = written(RESULTS)
    page = (folder / "report.md").read_text()
    assert "has not run" not in page
    figures = {
        "learning.png",
        "ladder.png",
        "relations.png",
        "sweeps.png",
        "tail-patch.png",
        "kinds.png",
        "order.png",
        "lds.png",
        "removal.png",
    }
    assert figures == {file.name for file in folder.glob("*.png")}
    assert all(f"]({name})" in page for name in figures)
    assert "| BM25 | 0.500 [0.400, 0.600] |" in page
    assert "| gold | +0.125 [-9.875, +10.125] |  |" in page, "points of a hundred, and no k = 3"
    assert "below 0, in 1 of 1 cases; of the others, in 0 of 0." in page
    assert "| Oslo is the capital of Norway | a | -0.500 | 320 | 0.125 | +25.00 |" in page
    assert "| Eyre is in |  Australia | Eyre: a lake | -0.250 | 319 | -0.500 | 0.250 | 0.000 |" in page
    assert "| sentence | flipped | 0.375 [0.275, 0.475] |" in page
    assert "| BM25 | 25.0% | 75.0% |" in page
    assert "| MRR, TrackStar − cosine, the next | +0.250 [+0.150, +0.350] | yes |" in page
    assert (
        "| percentage points after a step, TrackStar − BM25, k = 3 | +0.000 [-10.000, +10.000] | not shown |"
        in page
    )
    assert "| LDS, TrackStar − cosine | -0.875 [-0.975, -0.775] | no, the contrary |" in page
    assert "| MRR, int4 − the default | -0.062 [-0.163, +0.038] | within the noise |" in page
    assert (
        "| LDS | all (40) | about training passages (40) | about passages held out (40) | above TrackStar's |"
        in page
    )


def test_parts_that_have_not_run_are_named(written):
    page = (written(["ladder", "sweep-kind"]) / "report.md").read_text()
    for part in ("provenance", "tail_patch", "opponents", "kinds", "order", "lds", "removal"):
        assert f"python -m experiments.{part} --size small" in page
    assert "python -m experiments.ladder" not in page
    assert "python -m experiments.sweeps damping" in page
    assert "python -m experiments.sweeps kind" not in page
