"""The table behind kind="gaussian"."""

import functools
import math
from statistics import NormalDist

import numpy as np


@functools.cache
def gaussian_quantiles() -> np.ndarray:
    """Quantile midpoints of the standard normal, Φ⁻¹((j + ½)/65536) for j < 65536, at unit variance.

    Rounded to multiples of 2⁻²⁰: far coarser than any difference between machines' logarithms, so the table,
    and with it every Gaussian projection, is the same everywhere.

    Returns:
        (65536,) float64, antisymmetric around the middle.
    """
    normal = NormalDist()
    half = np.array([normal.inv_cdf((j + 0.5) / 65536) for j in range(32768)])
    half /= math.sqrt(np.mean(half**2))
    half = np.round(half * 2**20) / 2**20
    return np.concatenate([half, -half[::-1]])
