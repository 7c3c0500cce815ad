"""Factors on disk: the curvature of a model's loss, one Kronecker eigenbasis and its eigenvalues a matrix.

    FACTORS/factors.json        what is committed (see record.py); what it does not vouch for does not exist
    FACTORS/bases/<number>/     tensors.safetensors: "input" Q_A (I, I) and "output" Q_S (O, O), float32
    FACTORS/eigenvalues/        tensors.safetensors: Λ (O, I) of each module, by its name, float32
    FACTORS/sums/<pass>-<n>/    tensors.safetensors: running sums, float64, until the fit is done

All folders are sealed and never change (see trackstar/sealed.py).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trackstar.ekfac.record import NAME, Record
from trackstar.errors import StoreError
from trackstar.storage.durable import naming, new_folder
from trackstar.storage.sealed import Seal, SealedFolder, seal

TENSORS = "tensors.safetensors"


class Factors:
    """Complete factors, opened for reading; :func:`open_factors` makes them.

    A file's checksum is compared before its first tensor is served.

    Attributes:
        path: the folder.
        shapes: {module: (O, I)} in order; I counts a bias that was taken as a column.
    """

    def __init__(self, path: Path, record: Record) -> None:
        self.path = path
        self.shapes = record.shapes
        self._record = record
        self._checked: set[str] = set()

    def __repr__(self) -> str:
        return f"Factors({str(self.path)!r}, {len(self.shapes)} modules, {self.identity['sample']} examples)"

    @property
    def identity(self) -> dict[str, Any]:
        """What was fitted: modules, biases, seed, model, tokenizer, examples, as JSON values."""
        return self._record.identity

    @property
    def biases(self) -> bool:
        """Whether biases were taken as columns."""
        return self.identity["biases"]

    def basis(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Q_A (I, I) and Q_S (O, O) float32 of a module, eigenvectors in columns.

        Raises:
            StoreError: a file is damaged.
        """
        number = list(self.shapes).index(name)
        folder = SealedFolder(self.path, basis_name(number), self._record.bases[number])
        fan_out, fan_in = self.shapes[name]
        input_basis = self._tensor(folder, "input", (fan_in, fan_in))
        return input_basis, self._tensor(folder, "output", (fan_out, fan_out))

    def eigenvalues(self, name: str) -> torch.Tensor:
        """Λ (O, I) float32 of a module: E[(Q_Sᵀ g Q_A)²], entry by entry.

        Raises:
            StoreError: a file is damaged.
        """
        if self._record.eigenvalues is None:
            raise StoreError(f"the factors at {self.path} are not complete: run their fit again to finish it")
        folder = SealedFolder(self.path, "eigenvalues", self._record.eigenvalues)
        return self._tensor(folder, name, self.shapes[name])

    def _tensor(self, folder: SealedFolder, key: str, shape: tuple[int, int]) -> torch.Tensor:
        if folder.name not in self._checked:
            folder.require()
            self._checked.add(folder.name)
        return read_tensor(folder, key, torch.float32, shape)


def open_factors(path: str | os.PathLike[str]) -> Factors:
    """Open complete factors for reading.

    Args:
        path: the folder that :func:`trackstar.ekfac.fit_factors` wrote.

    Raises:
        FileNotFoundError: there are none at ``path``.
        StoreError: they are damaged, incomplete or of another format version.
    """
    path = Path(path)
    record = Record.read(path)
    if record is None:
        raise FileNotFoundError(f"there are no factors at {path} (no {NAME})")
    if record.eigenvalues is None:
        raise StoreError(f"the factors at {path} are not complete: run their fit again to finish it")
    return Factors(path, record)


def basis_name(number: int) -> str:
    """Where the eigenvectors of the ``number``-th module go, below the factors' folder."""
    return f"bases/{number:06d}"


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Seal:
    """Write a sealed folder of tensors.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with new_folder(folder, size) as new, naming(new):
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, new / TENSORS)
        except SafetensorError as error:
            raise OSError(f"cannot write {new}: {error}") from None
        return seal(new)


def read_tensor(folder: SealedFolder, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a folder that :func:`write_tensors` wrote, whose files have been compared with their checksums.

    Raises:
        DamageError: it is missing, or not of this dtype and shape.
    """
    try:
        with safe_open(folder.path / TENSORS, "pt") as file:
            tensor = file.get_tensor(key)
    except (SafetensorError, FileNotFoundError) as error:
        raise folder.error(f"{folder.name}/{TENSORS} has no {key!r}: {error}") from None
    if tensor.dtype != dtype or tensor.shape != shape:
        raise folder.error(f"{folder.name}/{TENSORS}: {key!r} is not {dtype} of shape {shape}")
    return tensor
