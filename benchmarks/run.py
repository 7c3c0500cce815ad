"""Every benchmark that needs no download, each in a process of its own: ``make bench`` or ``python -m benchmarks.run``."""

import subprocess
import sys

BENCHMARKS = ("gradient", "scoring", "pipeline", "threads", "correction")


def main() -> None:
    for name in BENCHMARKS:
        print(f"\n== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
