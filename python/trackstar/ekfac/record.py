"""The one file that says what a folder of factors holds, replaced as a whole at every commit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import xxhash

from trackstar.errors import StoreError
from trackstar.storage.durable import replace_file
from trackstar.storage.sealed import Seal

FORMAT = 1
NAME = "factors.json"


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything committed.

    Attributes:
        identity: what the factors are of, as JSON values; a fit goes on only where it is the same.
        summed: examples that the running sums hold.
        sums: seal of the folder with the running sums of the pass under way, None where there are none.
        bases: seals of the eigenvectors of the first modules; of all of them once the first pass is over.
        eigenvalues: seal of Λ, None until it is known; the factors are complete with it.
    """

    identity: dict[str, Any]
    summed: int = 0
    sums: Seal | None = None
    bases: tuple[Seal, ...] = ()
    eigenvalues: Seal | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """{module: (O, I)} in order; I counts a bias that was taken as a column."""
        return {name: (fan_out, fan_in) for name, (fan_out, fan_in) in self.identity["modules"].items()}

    @property
    def has_bases(self) -> bool:
        """Whether the eigenvectors of every module are there."""
        return len(self.bases) == len(self.identity["modules"])

    @property
    def sums_name(self) -> str:
        """The folder of the running sums, below that of the factors."""
        return f"sums/{'eigenvalues' if self.has_bases else 'covariances'}-{self.summed:010d}"

    def write(self, path: Path) -> None:
        """Commit: replace the record in the folder ``path`` atomically and durably."""
        content = json.dumps(
            {
                "identity": self.identity,
                "summed": self.summed,
                "sums": self.sums and self.sums.as_list(),
                "bases": [seal.as_list() for seal in self.bases],
                "eigenvalues": self.eigenvalues and self.eigenvalues.as_list(),
            }
        )
        document = {"format": FORMAT, "xxh3": xxhash.xxh3_128_hexdigest(content.encode()), "content": content}
        replace_file(path / NAME, json.dumps(document).encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """The record in the folder ``path``, None where there is none.

        Raises:
            StoreError: it is damaged or of another format version.
        """
        try:
            text = (path / NAME).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            document = json.loads(text)
            if document["format"] != FORMAT:
                raise StoreError(
                    f"{path} holds factors of format {document['format']!r}; this version reads format {FORMAT}"
                )
            content = document["content"]
            if xxhash.xxh3_128_hexdigest(content.encode()) != document["xxh3"]:
                raise ValueError("it does not match its own checksum")
            fields = json.loads(content)
            record = cls(
                fields["identity"],
                fields["summed"],
                fields["sums"] and Seal.from_list(fields["sums"]),
                tuple(Seal.from_list(value) for value in fields["bases"]),
                fields["eigenvalues"] and Seal.from_list(fields["eigenvalues"]),
            )
            if len(record.bases) > len(record.shapes):
                raise ValueError("it has more bases than modules")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise StoreError(f"{path / NAME} is damaged: {error}") from None
        return record
