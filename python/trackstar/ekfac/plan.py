"""What fitting factors and computing influences will need, said before they start."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.filesize import decimal

from trackstar.ekfac.capture import TokenBatch, TokenCapture
from trackstar.gradients.examples import Encoded
from trackstar.gradients.modules import select_weights
from trackstar.gradients.passes import BATCH_TOKENS, has_loss, vocabulary_size
from trackstar.storage.durable import require_disk

EIGENVECTORS = 50
"""Time of the eigenvectors of an n × n matrix in float64, in multiplications of a float32 product, over n³."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Needs of a piece of work.

    Attributes:
        work: what it is.
        path: where it writes, None if nowhere.
        disk_bytes: disk that the result takes.
        working_bytes: disk that is needed on top of it until the work is done.
        written_bytes: disk that an earlier run has already filled.
        memory_bytes: peak memory, roughly, beside what Python and its libraries take.
        seconds: rough duration, from one timed batch and one timed product.
    """

    work: str
    path: Path | None
    disk_bytes: int
    working_bytes: int
    written_bytes: int
    memory_bytes: int
    seconds: float

    def __str__(self) -> str:
        disk = ""
        if self.path is not None:
            result, working = decimal(self.disk_bytes), decimal(self.working_bytes)
            disk = f"{result} on disk at {self.path} (and {working} until it is done), "
        duration = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"
        return f"{self.work}: {disk}about {decimal(self.memory_bytes)} of memory at most, about {duration}"

    def require_disk(self) -> None:
        """Raise OSError where the disk has less free than the work will write."""
        if self.path is not None:
            require_disk(self.path, self.disk_bytes + self.working_bytes - self.written_bytes, "the fit")


def plan_fit(path: Path, capture: TokenCapture, examples: Sequence[Encoded], *, done: float = 0.0) -> Plan:
    """Plan a fit, or the rest of one; runs one batch of middling length, and one product, to see how fast they are.

    Args:
        path: where the factors go.
        capture: what sees the model's gradients.
        examples: those that are fitted on.
        done: how many of the two passes over them are done.
    """
    sides, whole, cubes = (
        sum(term(fan_out, fan_in) for fan_out, fan_in in capture.shapes.values())
        for term in (lambda o, i: o**2 + i**2, lambda o, i: o * i, lambda o, i: o**3 + i**3)
    )
    largest = max(max(shape) for shape in capture.shapes.values())
    tokens = sum(len(example) for example in examples)
    per_token, per_product = seconds_per_token(capture, examples), seconds_per_product()
    first = tokens * (per_token + sides * per_product) + EIGENVECTORS * cubes * per_product
    second = tokens * (per_token + (sides + whole) * per_product)
    return Plan(
        work=f"factors of {len(capture.shapes)} matrices from {len(examples):,} examples",
        path=path,
        disk_bytes=4 * (sides + whole),
        # New sums are written before those they replace go.
        working_bytes=2 * 8 * max(sides, whole),
        written_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        # An eigendecomposition in float64 works on about six matrices.
        memory_bytes=pass_bytes(capture) + max(8 * sides + 48 * largest**2, 8 * whole + 4 * sides),
        seconds=max(1 - done, 0) * first + min(2 - done, 1) * second,
    )


def plan_influence(
    capture: TokenCapture,
    examples: Sequence[Encoded],
    passes: Sequence[tuple[int, np.ndarray]],
    rank: int,
    rescored: int,
) -> Plan:
    """Plan the scoring of queries; runs one batch, and one product, to see how fast they are.

    Args:
        capture: what sees the model's gradients.
        examples: the corpus.
        passes: of each pass, how many queries it scores, and the positions of the examples it scores them on.
        rank: of the queries' thin matrices.
        rescored: pairs of a query and an example that are scored anew at full rank.
    """
    sides = sum(min(rank, *shape) * sum(shape) for shape in capture.shapes.values())
    whole = sum(fan_out * fan_in for fan_out, fan_in in capture.shapes.values())
    per_token, per_product = seconds_per_token(capture, examples), seconds_per_product()
    scoring = 0.0
    for queries, positions in passes:
        tokens = sum(len(examples[i]) for i in positions)
        scoring += tokens * (per_token + queries * sides * per_product)
    tokens = rescored * sum(len(example) for example in examples) // len(examples)
    together = max(queries for queries, _ in passes)
    count = sum(len(positions) for _, positions in passes)
    return Plan(
        work=f"influence of examples on {sum(queries for queries, _ in passes):,} queries, {count:,} to score in "
        f"{len(passes)} passes and {rescored:,} pairs to score anew",
        path=None,
        disk_bytes=0,
        working_bytes=0,
        written_bytes=0,
        memory_bytes=pass_bytes(capture) + 4 * max(together * sides, whole),
        seconds=scoring + tokens * (per_token + whole * per_product),
    )


def pass_bytes(capture: TokenCapture) -> int:
    """Memory of a pass: the model, and a batch's activations, gradients and logits, roughly."""
    model = capture.lean.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # A token sees few experts of a mixture, which are a group.
    features = sum(
        sum(shape) for shape in {w.group: w.shape for w in select_weights(model).values()}.values()
    )
    logits = capture.lean.logit_tokens(BATCH_TOKENS) * vocabulary_size(model)
    # Activations are kept once, gradients and the attention's own buffers about double them. Drawing a label holds
    # twice the logits' memory beside them.
    return weights + 4 * (2 * BATCH_TOKENS * features + 3 * logits)


def seconds_per_token(capture: TokenCapture, examples: Sequence[Encoded]) -> float:
    """Time of a pass over one token, from a batch of middling length; 0 where no example has a loss."""
    counted = sorted((example for example in examples if has_loss(example)), key=len)
    if not counted:
        return 0.0
    middle = counted[len(counted) // 2 :]
    batch = [middle[i] for i in capture.lean.batches([len(example) for example in middle], BATCH_TOKENS)[0]]
    for _ in capture.run(batch[:1], _ignore):
        pass
    began = time.perf_counter()
    for _ in capture.run(batch, _ignore):
        pass
    return (time.perf_counter() - began) / sum(len(example) for example in batch)


def seconds_per_product() -> float:
    """Time of one multiplication and addition in a product of float32 matrices."""
    a = torch.ones(512, 512)
    a @ a
    began = time.perf_counter()
    a @ a
    return (time.perf_counter() - began) / 512**3


def _ignore(name: str, x: torch.Tensor, delta: torch.Tensor, batch: TokenBatch) -> None:
    pass
