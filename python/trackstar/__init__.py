"""TrackStar: which training examples made a language model say this?

Build a store of projected, optimizer-corrected, whitened gradients once; ask it any number of questions, each
answered in one scan. The kernels underneath are the separate package ``trackstar_kernels``.

Names are loaded on first use, so importing this package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trackstar.errors import StoreError as StoreError
    from trackstar.evaluation.tail_patch import TailPatch as TailPatch
    from trackstar.evaluation.tail_patch import tail_patch as tail_patch
    from trackstar.exchange.bergson import import_bergson as import_bergson
    from trackstar.exchange.bergson import rows_from_bergson as rows_from_bergson
    from trackstar.exchange.export import export_rows as export_rows
    from trackstar.exchange.viewer import read_jsonl_results as read_jsonl_results
    from trackstar.gradients.collector import GradientCollector as GradientCollector
    from trackstar.gradients.passes import collect_rows as collect_rows
    from trackstar.gradients.spec import SketchSpec as SketchSpec
    from trackstar.gradients.training import TrainerRows as TrainerRows
    from trackstar.optimizer.correction import Correction as Correction
    from trackstar.optimizer.second_moments import SecondMoments as SecondMoments
    from trackstar.scoring.attribution import attribute as attribute
    from trackstar.scoring.checkpoints import tracin as tracin
    from trackstar.scoring.companion import companion_store as companion_store
    from trackstar.scoring.report import print_result as print_result
    from trackstar.scoring.result import Result as Result
    from trackstar.storage.append import append_store as append_store
    from trackstar.storage.build import build_store as build_store
    from trackstar.storage.deletion import delete_rows as delete_rows
    from trackstar.storage.merge import merge_stores as merge_stores
    from trackstar.storage.repair import repair_store as repair_store
    from trackstar.storage.rewriting import reencode_store as reencode_store
    from trackstar.storage.rewriting import rewhiten_store as rewhiten_store
    from trackstar.storage.store import Store as Store
    from trackstar.storage.store import open_store as open_store
    from trackstar.storage.verify import verify_store as verify_store

_HOMES = {
    "Correction": "optimizer.correction",
    "GradientCollector": "gradients.collector",
    "Result": "scoring.result",
    "SecondMoments": "optimizer.second_moments",
    "SketchSpec": "gradients.spec",
    "Store": "storage.store",
    "StoreError": "errors",
    "TailPatch": "evaluation.tail_patch",
    "TrainerRows": "gradients.training",
    "append_store": "storage.append",
    "attribute": "scoring.attribution",
    "build_store": "storage.build",
    "collect_rows": "gradients.passes",
    "companion_store": "scoring.companion",
    "delete_rows": "storage.deletion",
    "export_rows": "exchange.export",
    "import_bergson": "exchange.bergson",
    "merge_stores": "storage.merge",
    "open_store": "storage.store",
    "print_result": "scoring.report",
    "read_jsonl_results": "exchange.viewer",
    "reencode_store": "storage.rewriting",
    "repair_store": "storage.repair",
    "rewhiten_store": "storage.rewriting",
    "rows_from_bergson": "exchange.bergson",
    "tail_patch": "evaluation.tail_patch",
    "tracin": "scoring.checkpoints",
    "verify_store": "storage.verify",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trackstar' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trackstar.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
