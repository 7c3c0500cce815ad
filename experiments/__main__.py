"""Run the study from nothing to the report; what is there already is not made again."""

import importlib
import sys
import time

from experiments.study import study

PARTS = (
    "provenance",
    "ladder",
    "sweeps",
    "tail_patch",
    "kinds",
    "order",
    "opponents",
    "lds",
    "removal",
    "report",
)
"""In order. Each is also a command of its own: python -m experiments.<part>."""


def main() -> int:
    """Run every part that the size does not leave out, each with the options given."""
    here = study(__doc__)
    begun = time.perf_counter()
    for part in (part for part in PARTS if part not in here.size.left_out):
        start = time.perf_counter()
        importlib.import_module(f"experiments.{part}").main(sys.argv[1:])
        print(f"{part}: {time.perf_counter() - start:.0f} s at size {here.name}", flush=True)
    print(f"all parts: {time.perf_counter() - begun:.0f} s at size {here.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
