"""Turn every part's JSON into one page, report/report.md and .html, with figures. Parts that have not run are named."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from experiments import report_claims, report_effects, report_quality
from experiments.document import Document, Record
from experiments.study import study
from experiments.sweeps import SWEEPS

Section = Callable[[Document, Record, Path], None]

SECTIONS: dict[str, tuple[str, Section]] = {
    "provenance": ("Provenance: what was trained on, and what was learned", report_quality.provenance),
    "ladder": ("The ladder: every method on the same questions and passages", report_quality.ladder),
    "sweeps": ("Sweeps: one setting at a time", report_quality.sweeps),
    "tail_patch": ("Tail-patch: what a step on a proponent does to the answer", report_effects.tail_patch),
    "opponents": ("Gold that looks like an opponent", report_effects.opponents),
    "kinds": ("What kinds of passages are found", report_effects.kinds),
    "order": ("The order of words", report_effects.order),
    "lds": ("Ground truth: what retraining on half of the passages does", report_effects.lds),
    "removal": ("Ground truth: what retraining without the best passages does", report_effects.removal),
}
"""By part: its heading, and what adds the rest."""


def main(argv: list[str] | None = None) -> int:
    """Write the page."""
    here = study(__doc__, argv)
    files = sorted(here.path("results", "any").parent.glob("*.json"))
    records = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    folder = here.path("report", "any").parent
    page = Document(f"Evidence: the study at size {here.name}, seed {here.seed}")
    _machine(page, records)
    swept = {name: records[f"sweep-{name}"] for name in SWEEPS if f"sweep-{name}" in records}
    records |= {"sweeps": swept} if swept else {}
    report_claims.claims(page, records)
    for part, (title, section) in SECTIONS.items():
        page.heading(title)
        if part in records:
            section(page, records[part], folder)
        else:
            page.text(f"This part has not run (python -m experiments.{part} --size {here.name}).")
    page.write(folder, "report")
    print(folder / "report.html")
    return 0


def _machine(page: Document, records: Mapping[str, Record]) -> None:
    made = {
        json.dumps([record["machine"], record["versions"]], sort_keys=True) for record in records.values()
    }
    for text in sorted(made):
        machine, versions = json.loads(text)
        said = ", ".join(f"{name} {value}" for name, value in (machine | versions).items())
        page.text(f"Made with: {said}.")


if __name__ == "__main__":
    sys.exit(main())
