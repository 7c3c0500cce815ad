"""bergson beside this engine, each against its own training step: ``python -m benchmarks.peers [ENVIRONMENT]``.

Makes a virtual environment of the peers' own (6 GB; downloads from PyPI) unless ENVIRONMENT has one, and has its Python
run peers_bergson.py on case A of the pipeline. Both sides are held to one version of torch. Our figures are
those that ``benchmarks.pipeline`` saved.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import RESULTS, save
from benchmarks.models import CASES
from benchmarks.peers_environment import ENVIRONMENT, OFFLINE, python_of

OURS = {
    "none p16": "none p16",
    "none p64": "none p64",
    "Adafactor p16": "rank-1 p16",
    "Adam p16": "exact p16",
    "Adam p64": "exact p64",
}
"""The peer's lines and the ones of our pipeline that do the same."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environment", type=Path, nargs="?", default=ENVIRONMENT)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    theirs = measure(python_of(arguments.environment), arguments.rounds)
    ours = own_ratios()
    versions = theirs["versions"]
    print(f"{CASES['A'].description}; bergson {versions['bergson']}, torch {versions['torch']}, 1 thread")
    print(f"{'bergson':<14} {'seconds':>8} {'÷ full':>7}   {'ours':<11} {'÷ full':>7}")
    for line, figures in theirs["lines"].items():
        name = OURS.get(line, line)
        mine = f"{ours[name]:>7.3f}" if name in ours else "  run benchmarks.pipeline"
        seconds = figures["seconds"]["median"]
        print(f"{line:<14} {seconds:>8.3f} {figures['of full']:>7.3f}   {name:<11} {mine}")
    print(f"written: {save('peers', theirs | {'ours': ours})}")


def measure(python: Path, rounds: int) -> dict[str, object]:
    """What peers_bergson.py found, with the model saved for it."""
    with tempfile.TemporaryDirectory() as folder:
        CASES["A"].model().save_pretrained(f"{folder}/model")
        output = Path(folder) / "bergson.json"
        command = [python, "-m", "benchmarks.peers_bergson", f"{folder}/model", output]
        own = OFFLINE | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*command, "--rounds", str(rounds)],
            env=os.environ | own,
            cwd=Path(__file__).parent.parent,
            check=True,
            stdout=sys.stderr,
        )
        return json.loads(output.read_text())


def own_ratios() -> dict[str, float]:
    """{line: ratio to the full step} of case A as the pipeline saved them, if it has run."""
    path = RESULTS / "pipeline-A.json"
    if not path.exists():
        return {}
    lines = json.loads(path.read_text())["cases"]["lines"]
    return {name: line["of full"] for name, line in lines.items()}


if __name__ == "__main__":
    main()
