"""Every benchmark that needs no download, each in its own process: ``make bench``, ``python -m benchmarks.run``."""

import subprocess
import sys

BENCHMARKS = ("gradient", "scoring", "codes", "encode", "pipeline", "threads", "correction", "store", "scan")


def main() -> None:
    for name in BENCHMARKS:
        print(f"\n== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
