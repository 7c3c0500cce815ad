"""What can be wrong with a store."""

from pathlib import Path


class StoreError(Exception):
    """A store that cannot be used as asked: damaged, incomplete, of another version, or of something else."""


class DamageError(StoreError):
    """A file of a store is not as it was written.

    Attributes:
        line: which file, and how it differs.
    """

    def __init__(self, root: Path, line: str) -> None:
        super().__init__(root, line)
        self.line = line

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.line}; nothing is served from it"
