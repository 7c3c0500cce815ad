"""EK-FAC influence functions (Grosse et al., arXiv 2308.03296): fit a model's curvature once, then ask for influences.

Names are loaded on first use, so importing this package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trackstar.ekfac.factors import Factors as Factors
    from trackstar.ekfac.factors import open_factors as open_factors
    from trackstar.ekfac.fitting import fit_factors as fit_factors
    from trackstar.ekfac.query import influence as influence

_HOMES = {
    "Factors": "factors",
    "fit_factors": "fitting",
    "influence": "query",
    "open_factors": "factors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trackstar.ekfac' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trackstar.ekfac.{_HOMES[name]}"), name)
