"""Queries prepared for the shards of a store."""

import torch

from trackstar_kernels._checks import check_backend, check_flag, check_shape, check_tensor
from trackstar_kernels._dispatch import implementation
from trackstar_kernels.scoring._arguments import (
    check_ends,
    check_finite,
    check_mixed_rows,
    check_narrow,
    check_places,
    check_reached,
    check_task,
    check_wider,
)
from trackstar_kernels.scoring._hessian import Found, PreparedTask, Reached, WiderRows


def prepare_task(
    queries: torch.Tensor,
    mixing: float,
    *,
    asked: range | None = None,
    task: range | None = None,
    backend: str | None = None,
) -> "Task":
    """What :func:`mixed_topk` has to compute of its queries alone, once for any number of calls.

    Args:
        queries: (Q, L, d) float32, finite, whitened. Not to be changed while the task is in use.
        mixing: λ, 0 ≤ λ < 1.
        asked: positions of the queries that are scored, consecutive; None for all. The others shape R_task alike, so
            that batches of a task's queries have the scores that they have together.
        task: positions of the queries that make R_task, consecutive; None for all. The others are scored alone, under
            a Hessian that they have no part in.
        backend: None, "cpu", "cuda" or "reference".

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: the shape, mixing, asked, task or the backend is wrong, or queries are not finite.
    """
    check_task(queries, mixing)
    check_backend(backend)
    asked = range(len(queries)) if asked is None else asked
    for name, part in (("asked", asked), ("task", task)):
        if part is not None and not isinstance(part, range):
            raise TypeError(f"{name} must be a range or None, got {type(part).__name__}")
        if part is not None and not (0 <= part.start < part.stop <= len(queries) and part.step == 1):
            raise ValueError(f"{name} must be a range within 0 to {len(queries)} (the queries), got {part}")
    parts = (None if part is None else slice(part.start, part.stop) for part in (asked, task))
    with torch.no_grad():
        return Task(queries, len(asked), prepare(queries, float(mixing), backend, *parts))


class Task:
    """Queries and their Hessian, ready to score the shards of a store one after another: see :func:`prepare_task`."""

    def __init__(self, queries: torch.Tensor, count: int, prepared: PreparedTask) -> None:
        """Not to be called from outside: ``prepared`` is what a backend made of the queries, to score ``count``."""
        self._queries = queries
        self._count = count
        self._prepared = prepared

    def topk(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        *,
        scales: torch.Tensor | None = None,
        largest: bool = True,
        start: int = 0,
        reached: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What :func:`mixed_topk` returns for the task's queries and λ, bit for bit; same arguments, same errors.

        With ``reached`` (Q,) float32, scores that k rows elsewhere have, or NaN, rows that are farther from the end
        need not be found: what is left over of the k places holds NaN.
        """
        check_flag("largest", largest)
        (found,) = self._scan(rows, squared_norms, k, scales, (largest,), start, (reached,))
        return found

    def extremes(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        *,
        scales: torch.Tensor | None = None,
        start: int = 0,
        reached: Reached = (None, None),
    ) -> tuple[Found, Found]:
        """What :meth:`topk` returns for ``largest`` True and False, bit for bit, on the CPU from one scan."""
        highest, lowest = self._scan(rows, squared_norms, k, scales, (True, False), start, reached)
        return highest, lowest

    def rescored_topk(
        self,
        codes: torch.Tensor,
        wider: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        *,
        scales: torch.Tensor,
        largest: bool = True,
        start: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What :func:`rescored_mixed_topk` returns for the task's queries and λ; same arguments, same errors."""
        check_flag("largest", largest)
        ((scores, indices),), count = self.rescored(
            codes, wider, squared_norms, k, scales=scales, ends=(largest,), start=start
        )
        return scores, indices, torch.full_like(indices[:, 0], count)

    def rescored(
        self,
        codes: torch.Tensor,
        wider: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        *,
        scales: torch.Tensor,
        ends: tuple[bool, ...] = (True,),
        start: int = 0,
        places: torch.Tensor | None = None,
        reached: Reached = (),
    ) -> tuple[list[Found], int]:
        """What :meth:`topk` and :meth:`extremes` find among wider rows, as far as it may be of use.

        Args:
            codes: (N, L, …), wider (n, L, d), squared_norms and scales (N, L): see :func:`rescored_mixed_topk`.
            wider: those of the codes, or more: see ``places``.
            squared_norms: before narrowing.
            k: results per query and end, 1 ≤ k ≤ N.
            scales: those of the codes.
            ends: which scores are sought, True for the largest; all in one pass.
            start: index of the first row, added to all indices.
            places: (N,) int64, which of the wider rows the N codes are of; None where those are as many.
            reached: for each end scores (Q,) that k rows elsewhere have reached, or None. Rows that are farther from
                the end are not looked for.

        Returns:
            Scores and indices for each end: k of them, or, with ``reached``, fewer if fewer rows were scored. And
            the number of wider rows that were scored.
        """
        taken = check_tensor("wider", wider)
        if places is not None:
            check_shape("wider", wider, ("n", *self._queries.shape[1:]))
            check_places(places, wider)
            taken = wider[:1].expand(len(places), *wider.shape[1:])
        check_wider(self._queries, codes, taken, squared_norms, k, scales, start)
        check_ends(ends)
        reached = reached or (None,) * len(ends)
        check_reached(reached, ends, self._count)
        with torch.no_grad():
            rows = WiderRows(wider, places)
            found, count = self._prepared.rescored(codes, rows, squared_norms, k, scales, ends, reached)
        return [(scores, indices + start) for scores, indices in found], count

    def score_bounds(
        self, codes: torch.Tensor, squared_norms: torch.Tensor, *, scales: torch.Tensor
    ) -> torch.Tensor:
        """What :func:`score_bounds` says of all the rows (N, L, …) under the task's queries and λ: (Q, N) float32.

        Raises:
            TypeError: an argument has a wrong type or dtype.
            ValueError: a shape is wrong.
            NotImplementedError: the task is of another backend than "cpu".
        """
        check_narrow(self._queries, codes, squared_norms, scales)
        with torch.no_grad():
            return self._prepared.score_bounds(codes, squared_norms, scales)

    def _scan(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        ends: tuple[bool, ...],
        start: int,
        reached: Reached,
    ) -> list[Found]:
        check_mixed_rows(self._queries, rows, squared_norms, k, scales, start)
        check_reached(reached, ends, self._count)
        if scales is not None and scales.dim() == 1:
            scales = scales[:, None]
        with torch.no_grad():
            return self._prepared.scan(rows, squared_norms, k, scales, ends, start, reached)


def prepare(
    queries: torch.Tensor,
    mixing: float,
    backend: str | None,
    asked: slice | None = None,
    task: slice | None = None,
) -> PreparedTask:
    """The task of a backend, once shapes and dtypes are known to fit."""
    check_finite(queries)
    package = "trackstar_kernels.scoring"
    make = implementation(package, "mixed_topk", queries.device, backend, function="prepare_task")
    prepared: PreparedTask = make(queries, mixing, asked or slice(None), task)
    return prepared
