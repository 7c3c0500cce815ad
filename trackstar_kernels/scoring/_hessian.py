"""A task's inverse Hessian in the form that scans use, on any device.

With x the queries of a block as rows, c = λ / ((1 − λ)·Q), and every term times 1 − λ,

    few queries:   C Cᵀ = I + c·x xᵀ (Q × Q)    factor = C⁻¹ x    combine = C⁻ᵀ      yᵀ R⁻¹ y = ‖y‖² − c·‖t‖²
    many queries:  C Cᵀ = I + c·xᵀ x (d × d)    factor = C⁻¹      combine = x C⁻ᵀ    yᵀ R⁻¹ y = ‖t‖²

where t = factor · y, and x R⁻¹ y = combine · t in both.

A query that is not of the task, z, goes into the second form as z C⁻ᵀ. For the first one, let the rows of V be an
orthonormal basis of the task's span, in which xᵀ x is diag(S), and r = z − z Vᵀ V: then

    factor = √(S / (1 + c·S)) V, and s·r below it        combine = z Vᵀ / √(S (1 + c·S)), and 1/s beside it

with s so small that what s·r adds to ‖t‖² is lost in rounding.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from trackstar_kernels._codes import NARROW, decode_rows
from trackstar_kernels.scoring._merge import merge_topk

# Float32 keeps the squared norm of a row to about 2⁻²⁴ of ‖y‖² where terms of that size cancel, and its root
# to 2⁻²⁴ of ‖y‖ where ‖t‖² is all there is: where less than this is left of ‖y‖², it is computed in float64.
TRUSTED_DIFFERENCE = 0.05
TRUSTED_SQUARE = 0.05**2

SCRATCH = 64 * 2**20  # bytes of working memory for doing that

HIDDEN = 2.0**-20  # what queries outside of the task may add to √c·‖t‖, as a part of ‖y‖

NEGLIGIBLE = 1e-12  # eigenvalues of the task's Gram matrix below this part of the largest are rounding

Found = tuple[torch.Tensor, torch.Tensor]
"""Scores (Q, k) and indices (Q, k)."""

Reached = Sequence[torch.Tensor | None]
"""For each end scores (Q,) float32, contiguous, that k rows elsewhere have, or None; empty for None everywhere. A scan
may leave out what is worse, and fills up with NaN."""


@dataclasses.dataclass(frozen=True)
class Hessian:
    """Of ``queries`` (Q, L, d): those ``asked`` are scored, those of ``task``, None for all, make R_task.

    Attributes:
        queries: whitened, float32.
        mixing: λ.
        asked: a slice of the queries.
        task: a slice of the queries, or None.
        uneven: whether a backend's factors may differ in size by as much as :data:`HIDDEN`.
    """

    queries: torch.Tensor
    mixing: float
    asked: slice
    task: slice | None = None
    uneven: bool = True

    @property
    def count(self) -> int:
        """Queries that are scored."""
        return len(self.queries[self.asked])

    @property
    def members(self) -> int:
        """Queries that make R_task."""
        return len(self.queries[self.task or slice(None)])

    @property
    def coupling(self) -> float:
        """λ / ((1 − λ)·Q), Q being the task's queries."""
        return self.mixing / ((1 - self.mixing) * self.members)

    @property
    def many(self) -> bool:
        """Whether the d × d form is used: a little before Q = d, where few directions are left outside the
        queries' span, so that ‖y‖² − c·‖t‖² would cancel for nearly every row.
        """
        return 7 * self.queries.shape[2] < 8 * self._few or (self.task is not None and not self.uneven)

    @property
    def _few(self) -> int:
        """R in the form for few queries."""
        return self.members + (0 if self.task is None else self.count)

    @property
    def rank(self) -> int:
        """r, the length of t."""
        return self.queries.shape[2] if self.many else self._few

    @property
    def base(self) -> float:
        """Of yᵀ R⁻¹ y = base · ‖y‖² + sign · ‖t‖²."""
        return 0.0 if self.many else 1.0

    @property
    def sign(self) -> float:
        """See ``base``."""
        return 1.0 if self.many else -self.coupling

    @property
    def trusted(self) -> float:
        """The share of a row's squared norm that must be left for a scan to be trusted with it."""
        return TRUSTED_SQUARE if self.many else TRUSTED_DIFFERENCE

    def blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each block factor (r, d), and of the queries asked combine (q, r) and xᵀ R⁻¹ x (q,); float64."""
        for block in self.queries.unbind(1):
            x, asked = block[self.task or slice(None)].double(), block[self.asked].double()
            if self.task is not None and not self.many:
                yield self._of_others(x, asked)
                continue
            gram = x.T @ x if self.many else x @ x.T
            identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
            cholesky = torch.linalg.cholesky(identity + self.coupling * gram)
            inverse = torch.linalg.solve_triangular(cholesky, identity, upper=False)
            if self.many:
                combine = asked @ inverse.T
                yield inverse, combine, combine.square().sum(1)
            else:
                squares = (inverse * (inverse @ gram)).sum(0)
                yield inverse @ x, inverse.T[self.asked], squares[self.asked]

    def _of_others(
        self, x: torch.Tensor, asked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What :meth:`blocks` yields for ``asked`` (q, d) under the task of ``x`` (Q, d), fewer than dimensions."""
        strength, vectors = torch.linalg.eigh(x @ x.T)
        kept = strength > NEGLIGIBLE * strength[-1]
        strength = torch.where(kept, strength, 1)
        basis = torch.where(kept, vectors * strength.rsqrt(), 0).T @ x
        damped = 1 + self.coupling * strength
        along = asked @ basis.T
        rest = asked - along @ basis
        size = rest.square().sum(1)
        # Powers of two, so that s · (1/s) = 1 whatever the dtype.
        most = HIDDEN * inverse_root(self.coupling * len(asked) * size)
        small = torch.where(most == 0, 1, torch.exp2(most.log2().floor()))
        factor = torch.cat([(strength / damped).sqrt()[:, None] * basis, small[:, None] * rest])
        combine = torch.cat([along * (strength * damped).rsqrt(), torch.diag(1 / small)], dim=1)
        return factor, combine, (along.square() / damped).sum(1) + size

    def rescored(
        self,
        found: tuple[torch.Tensor, torch.Tensor],
        doubtful: torch.Tensor,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        squared_norms: torch.Tensor | None,
        k: int,
        largest: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best of what a scan found among the other rows, and of the ``doubtful`` ones, scored in float64.

        ``found`` has k places, of which those that are left over may hold anything. The norms of rows come from
        the stored values alone, and where narrowing took something from them, from the ``squared_norms`` (N, L)
        that they had before.
        """
        redo = doubtful.nonzero()[:, 0]
        if len(redo) == 0:
            return found
        known = min(k, len(rows) - len(redo))
        scores, indices = found[0][:, :known], found[1][:, :known]
        sizes = self.count + self.rank + 3 * self.queries.shape[2]
        for positions in redo.split(max(1, SCRATCH // (8 * sizes))):
            norms = None if squared_norms is None else squared_norms[positions]
            precise = self._precise_scores(rows, scales, positions, norms)
            parts = [(scores, indices), (precise, positions.expand_as(precise))]
            scores, indices = merge_topk(parts, k, largest)
        return scores, indices

    def _precise_scores(
        self,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        positions: torch.Tensor,
        squared_norms: torch.Tensor | None,
    ) -> torch.Tensor:
        """Scores of the rows at ``positions``, in float64; ``squared_norms`` are theirs."""
        q, n = self.count, len(positions)
        numerators = self.queries.new_zeros(q, n, dtype=torch.float64)
        query_squares = self.queries.new_zeros(q, dtype=torch.float64)
        row_squares = self.queries.new_zeros(n, dtype=torch.float64)
        kept = self.queries.new_zeros(n, dtype=torch.float64)
        for block, (factor, combine, square) in enumerate(self.blocks()):
            block_scales = None if scales is None else scales[positions, block : block + 1]
            codes = rows[positions, block : block + 1]
            y = decode_rows(codes, block_scales, self.queries.shape[2], torch.float64)[:, 0]
            t = factor @ y.T
            numerators.addmm_(combine, t)
            query_squares += square
            squares = y.square().sum(1)
            kept += squares
            row_squares += self.base * squares + self.sign * t.square().sum(0)
        if squared_norms is not None:
            row_squares += (squared_norms.double().sum(1) - kept).clamp_min(0)
        return (numerators * inverse_root(query_squares)[:, None] * inverse_root(row_squares)).float()


@dataclasses.dataclass(frozen=True)
class WiderRows:
    """Rows (n, L, d) of which those at ``places`` (N,) int64, None for all, are the wider copies of N narrow ones."""

    rows: torch.Tensor
    places: torch.Tensor | None = None

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """Copies of the narrow rows at these positions."""
        return self.rows[positions if self.places is None else self.places[positions]]


class PreparedTask:
    """What a backend's ``prepare_task`` returns; see ``Task`` of the package."""

    def scan(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        ends: tuple[bool, ...],
        start: int,
        reached: Reached = (),
    ) -> list[Found]:
        """A result for each of ``ends``, True for the largest scores; scales (N, L), (N, 1) or None."""
        raise NotImplementedError

    def rescored(
        self,
        codes: torch.Tensor,
        wider: WiderRows,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        ends: tuple[bool, ...],
        reached: Reached,
    ) -> tuple[list[Found], int]:
        """A result for each of ``ends``, and the number of wider rows scored: see ``Task.rescored``.

        Where codes give no bounds, all of them are.
        """
        everything = wider.at(torch.arange(len(codes), device=codes.device))
        return self.scan(everything, squared_norms, k, None, ends, 0), len(codes)

    def score_bounds(
        self, codes: torch.Tensor, squared_norms: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor:
        """(Q, N) float32, see ``Task.score_bounds``."""
        raise NotImplementedError("only tasks of the cpu backend bound scores, see score_bounds")


class CosineTask(PreparedTask):
    """λ = 0: inner products of unit vectors, by ``score_ends(queries, rows, k, scales, ends, start, reached)``."""

    def __init__(self, queries: torch.Tensor, score_ends: Callable[..., list[Found]]) -> None:
        self.score_ends = score_ends
        wide = queries.double()
        squares = torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True).square()
        self.unit = wide.mul_(inverse_root(squares)).float()

    def scan(
        self,
        rows: torch.Tensor,
        squared_norms: torch.Tensor,
        k: int,
        scales: torch.Tensor | None,
        ends: tuple[bool, ...],
        start: int,
        reached: Reached = (),
    ) -> list[Found]:
        unit = self.unit
        inverse = inverse_root(squared_norms.sum(1, keepdim=True))
        scales = inverse if scales is None else scales * inverse
        if scales.shape[1] == 1 and rows.dtype not in NARROW:
            unit, rows = unit.reshape(len(unit), 1, -1), rows.reshape(len(rows), 1, -1)
        return self.score_ends(unit, rows, k, scales, ends, start, reached)


def inverse_root(squares: torch.Tensor) -> torch.Tensor:
    """1/√x, and 0 for 0: what makes zero vectors score 0."""
    return torch.where(squares == 0, 0, squares.rsqrt())
