"""TrackStar: which training examples made a language model say this?

Build a store of projected, optimizer-corrected, whitened gradients once; ask it any number of questions, each
answered in one scan. The kernels underneath are the separate package ``trackstar_kernels``.

Names are loaded on first use, so importing this package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trackstar.append import append_store as append_store
    from trackstar.attribution import attribute as attribute
    from trackstar.bergson import import_bergson as import_bergson
    from trackstar.bergson import rows_from_bergson as rows_from_bergson
    from trackstar.build import build_store as build_store
    from trackstar.collector import GradientCollector as GradientCollector
    from trackstar.correction import Correction as Correction
    from trackstar.deletion import delete_rows as delete_rows
    from trackstar.errors import StoreError as StoreError
    from trackstar.export import export_rows as export_rows
    from trackstar.merge import merge_stores as merge_stores
    from trackstar.passes import collect_rows as collect_rows
    from trackstar.patching import TailPatch as TailPatch
    from trackstar.patching import tail_patch as tail_patch
    from trackstar.repair import repair_store as repair_store
    from trackstar.report import print_result as print_result
    from trackstar.result import Result as Result
    from trackstar.rewriting import reencode_store as reencode_store
    from trackstar.rewriting import rewhiten_store as rewhiten_store
    from trackstar.second_moments import SecondMoments as SecondMoments
    from trackstar.spec import SketchSpec as SketchSpec
    from trackstar.store import Store as Store
    from trackstar.store import open_store as open_store
    from trackstar.training import TrainerRows as TrainerRows
    from trackstar.verify import verify_store as verify_store
    from trackstar.viewer import read_jsonl_results as read_jsonl_results

_HOMES = {
    "Correction": "correction",
    "GradientCollector": "collector",
    "Result": "result",
    "SecondMoments": "second_moments",
    "SketchSpec": "spec",
    "Store": "store",
    "StoreError": "errors",
    "TailPatch": "patching",
    "TrainerRows": "training",
    "append_store": "append",
    "attribute": "attribution",
    "build_store": "build",
    "collect_rows": "passes",
    "delete_rows": "deletion",
    "export_rows": "export",
    "import_bergson": "bergson",
    "merge_stores": "merge",
    "open_store": "store",
    "print_result": "report",
    "read_jsonl_results": "viewer",
    "reencode_store": "rewriting",
    "repair_store": "repair",
    "rewhiten_store": "rewriting",
    "rows_from_bergson": "bergson",
    "tail_patch": "patching",
    "verify_store": "verify",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trackstar' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trackstar.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
