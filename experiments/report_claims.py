"""The report's first section: what the paper lets one hope for, and what this study says to each of it."""

from collections.abc import Iterator, Mapping

from experiments.document import Document, Record, interval
from experiments.ladder import TRACKSTAR

BY_TEXT = ("BM25", "embeddings")
"""The ladder's methods that are none of gradients."""

Claim = tuple[str, str, Mapping[str, float], str]
"""What is hoped for, of which difference it speaks, this difference, and whether it is so."""


def claims(page: Document, records: Mapping[str, Record]) -> None:
    """A line for each claim on which a part that has run has something to say."""
    lines = [
        [claim, of, interval(figure, signed=True), verdict]
        for claim, of, figure, verdict in (*_larger(records), *_alike(records))
    ]
    if lines:
        page.heading("In short")
        page.table(["hoped for", "difference", "", "this study"], lines)


def _reversed(figure: Mapping[str, float]) -> Mapping[str, float]:
    return {"value": -figure["value"], "low": -figure["high"], "high": -figure["low"]}


def _more(figure: Mapping[str, float]) -> str:
    return "yes" if figure["low"] > 0 else "no, the contrary" if figure["high"] < 0 else "not shown"


def _same(figure: Mapping[str, float]) -> str:
    return "within the noise" if figure["low"] <= 0 <= figure["high"] else "no"


def _larger(records: Mapping[str, Record]) -> Iterator[Claim]:
    """Claims of a difference above 0."""
    others = records["ladder"]["results"]["MRR above TrackStar's"] if "ladder" in records else {}
    if rivals := others.keys() - set(BY_TEXT):
        closest = max(rivals, key=lambda name: others[name]["value"])
        found = _reversed(others[closest])
        yield (
            "TrackStar finds facts better than every other gradient method",
            f"MRR, {TRACKSTAR} − {closest}, the next",
            found,
            _more(found),
        )
    if "tail_patch" in records:
        gains = records["tail_patch"]["results"]["gains"]
        row = max((row for row in gains if row["method"] == "BM25"), key=lambda row: row["k"])
        found = {name: 100 * value for name, value in row["TrackStar above it"].items()}
        yield (
            "TrackStar's proponents move the answer more than BM25's",
            f"percentage points after a step, {TRACKSTAR} − BM25, k = {row['k']}",
            found,
            _more(found),
        )
    if "lds" in records:
        (found,) = (
            _reversed(row["above TrackStar's"])
            for row in records["lds"]["results"]
            if (row["method"], row["queries"]) == ("cosine", "all")
        )
        yield (
            "TrackStar predicts retraining better than cosines of gradients",
            f"LDS, {TRACKSTAR} − cosine",
            found,
            _more(found),
        )


def _alike(records: Mapping[str, Record]) -> Iterator[Claim]:
    """Claims of no difference beyond the noise."""
    for sweep, setting, claim in (
        ("correction", "rank 4", "A correction of rank 4 is as good as the exact one"),
        ("dtype", "int4", "Rows of int4 are as good as those of float32"),
        ("kind", "CountSketch", "CountSketch is as good as dense projections"),
    ):
        if sweep in records.get("sweeps", {}):
            settings = {row["setting"]: row for row in records["sweeps"][sweep]["results"]["settings"]}
            found = settings[setting]["above the default"]
            yield claim, f"MRR, {setting} − the default", found, _same(found)
