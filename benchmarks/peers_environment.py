"""The virtual environment that the peers run in: bergson brings another torch, which is not to replace ours."""

import subprocess
import venv
from pathlib import Path

import torch

from benchmarks.machine import RESULTS

BERGSON = "bergson==2.5.1"
FAISS = "faiss-cpu==1.15.1"

ENVIRONMENT = RESULTS / "peers-env"
"""Where it is made, if nothing else is said."""

OFFLINE = {"HF_HUB_OFFLINE": "1"}
"""Environment variables that keep bergson from looking for its models on the network."""


def python_of(environment: Path) -> Path:
    """The environment's Python. Makes it, with bergson, FAISS and our version of torch, unless it is there: 6 GB."""
    python = environment.resolve() / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
        pip = [python, "-m", "pip"]
        same_torch = f"torch=={torch.__version__.split('+')[0]}"
        subprocess.run([*pip, "install", same_torch, BERGSON, FAISS], check=True)
        # Required by bergson and imported by none of it; where torch is not PyPI's own build they break transformers.
        subprocess.run([*pip, "uninstall", "-y", "torchvision", "torchaudio"], check=True)
    return python
