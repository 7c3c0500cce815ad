"""Kernels for training-data attribution: stateless functions on torch tensors.

Random projections, projected per-example gradients with optimizer correction, whitening into store rows,
and exact top-k scoring. Nothing here opens a file, reads an environment variable or knows a model, so the
kernels can be embedded in any attribution stack. Every op has a slow, obvious reference (``backend="reference"``)
and one native backend per device; :func:`available_backends` says which run here.
"""

from trackstar_kernels._codes import decode_rows
from trackstar_kernels._dispatch import available_backends
from trackstar_kernels.encode import encode_rows
from trackstar_kernels.gradient import project_gradients
from trackstar_kernels.scoring import mixed_topk, rescored_mixed_topk, rescored_topk, score_bounds, score_topk
from trackstar_kernels.sketch import projection_matrix

__all__ = [
    "available_backends",
    "decode_rows",
    "encode_rows",
    "mixed_topk",
    "project_gradients",
    "projection_matrix",
    "rescored_mixed_topk",
    "rescored_topk",
    "score_bounds",
    "score_topk",
]
