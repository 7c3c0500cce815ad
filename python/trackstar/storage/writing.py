"""Putting into a store what is there once: R_train, the correction, and rows that wait to be whitened."""

from pathlib import Path

import numpy as np
from mmap_ninja import numpy as np_ninja
from safetensors import SafetensorError

from trackstar.curvature import Curvature
from trackstar.errors import DamageError, StoreError
from trackstar.optimizer.correction import Correction
from trackstar.storage.durable import naming, new_folder
from trackstar.storage.sealed import Seal, SealedFolder, seal

CURVATURE_ARRAYS = ("train", "damping", "eigenvalues", "whitener")


def write_staged(final: Path, rows: np.ndarray) -> None:
    """Keep rows (n, L, d) float32 that are still to be whitened, with their checksum."""
    with new_folder(final, rows.nbytes) as folder:
        np_ninja.from_ndarray(folder / "rows", rows)
        (folder / "checksum").write_text(seal(folder / "rows").xxh3)


def read_staged(folder: Path) -> np.ndarray:
    """Rows (n, L, d) float32 that :func:`write_staged` left.

    Raises:
        StoreError: they are damaged.
    """
    staged = SealedFolder(folder, "rows", Seal(0, (folder / "checksum").read_text()))
    try:
        staged.require()
    except DamageError as error:
        raise StoreError(f"{error}: remove {folder} and run this again") from None
    return np_ninja.open_existing(staged.path, mode="c")


def write_curvature(root: Path, curvature: Curvature) -> Seal:
    """Write curvature/."""
    arrays = {name: getattr(curvature, name).numpy() for name in CURVATURE_ARRAYS}
    with new_folder(root / "curvature", sum(array.nbytes for array in arrays.values())) as folder:
        for name, array in arrays.items():
            np_ninja.from_ndarray(folder / name, array)
        return seal(folder)


def write_correction(root: Path, correction: Correction) -> Seal:
    """Write correction/.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    with new_folder(root / "correction", correction.bytes) as folder, naming(folder):
        try:
            correction.save(folder / "correction.safetensors")
        except SafetensorError as error:
            raise OSError(f"cannot write {folder}: {error}") from None
        return seal(folder)
