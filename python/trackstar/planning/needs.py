"""What builds and queries take: memory, disk and time, as sums of what they are known to hold."""

import dataclasses
from collections.abc import Sequence
from typing import Self

from trackstar.gradients.examples import Encoded
from trackstar.planning.rates import Rates
from trackstar.scoring.scan import fit_scan
from trackstar.storage.layout import Layout
from trackstar.storage.shard import example_bytes

TEXT_BYTES = 4.4
"""Bytes of English text that a token stands for, where the text itself is not known."""

OBJECT_BYTES = 950
"""Memory of an example's Python objects."""

SHARD_FILES = 3500
"""Bytes of a shard beside its arrays: checksums, and what mmap_ninja keeps of shapes and dtypes."""

EIGH = 30
"""Operations of a float64 eigendecomposition and of the whitener, over d³, at the speed of float32 matrix products:
measured as 37 for d = 256 and 22 for d = 1024 on one core with AVX-512."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a plan knows of the examples.

    Attributes:
        examples: how many.
        tokens: all of them together.
        longest: tokens of the longest.
        strings: bytes of ids, texts and metadata.
    """

    examples: int
    tokens: int
    longest: int
    strings: int

    @classmethod
    def of(cls, examples: Sequence[Encoded]) -> Self:
        """Of examples that are there."""
        lengths = [len(example) for example in examples]
        arrays = cls(len(examples), sum(lengths), max(lengths), 0).disk
        return cls(len(examples), sum(lengths), max(lengths), example_bytes(examples) - arrays)

    @classmethod
    def assumed(cls, examples: int, tokens: int) -> Self:
        """Of examples of so many tokens each, their text English, their ids their numbers."""
        return cls(
            examples, examples * tokens, tokens, round(examples * (tokens * TEXT_BYTES + len(str(examples))))
        )

    @property
    def disk(self) -> int:
        """Bytes of the examples in a store."""
        return 32 * (self.examples + 1) + 4 * (self.tokens + 1) + self.strings + 1

    @property
    def memory(self) -> int:
        """Bytes of the examples while a build goes on."""
        return OBJECT_BYTES * self.examples + 4 * self.tokens + self.strings


@dataclasses.dataclass(frozen=True)
class Job:
    """A model, what is captured of it, and a corpus.

    Attributes:
        weights: bytes.
        sketches: bytes of the projections.
        correction: bytes.
        layout: of the stored rows.
        shard_rows: examples per shard.
        sample: examples that R_train is estimated from.
        corpus: the examples.
        pass_bytes: most memory that a pass over a batch takes beyond the weights.
        seconds_per_token: of a build.
    """

    weights: int
    sketches: int
    correction: int
    layout: Layout
    shard_rows: int
    sample: int
    corpus: Corpus
    pass_bytes: int
    seconds_per_token: float

    @property
    def curvature(self) -> int:
        """Entries of R_train."""
        return self.layout.blocks * self.layout.size**2

    @property
    def store_bytes(self) -> int:
        """Disk of the finished store."""
        count, d = self.corpus.examples, self.layout.size
        shards = -(-count // self.shard_rows)
        curvature = 12 * self.curvature + 8 * self.layout.blocks * (d + 1)
        return (
            count * self.layout.row_bytes
            + self.corpus.disk
            + shards * SHARD_FILES
            + curvature
            + self.correction
        )

    @property
    def staging_bytes(self) -> int:
        """Disk that a build needs beside the store until it ends."""
        return 4 * min(self.sample, self.corpus.examples) * self.layout.blocks * self.layout.size

    @property
    def build_memory(self) -> int:
        """Most memory of a build, beyond that of an idle process."""
        rows = min(self.shard_rows, self.corpus.examples)
        whole = 4 * rows * self.layout.blocks * self.layout.size
        codes = rows * self.layout.row_bytes
        sampled = self.sample < self.corpus.examples
        collecting = whole + max(self.pass_bytes, whole) + (4 * self.curvature if sampled else 0)
        # R_train, its eigenvectors, those over the eigenvalues' roots, and their product, in float64.
        decomposing = whole + 32 * self.curvature
        writing = 4 * self.curvature + whole + max(whole + codes, 3 * codes)
        held = self.weights + self.sketches + self.correction + self.corpus.memory
        return held + max(collecting, decomposing, writing)

    @property
    def build_tokens(self) -> int:
        """Tokens that a build runs the model over: those of a sample twice, unless it is the whole corpus."""
        tokens, count = self.corpus.tokens, self.corpus.examples
        return tokens + (tokens * self.sample // count if self.sample < count else 0)

    @property
    def device_memory(self) -> int:
        """Most memory that a build takes on the device of the model."""
        return self.weights + self.sketches + self.correction + self.pass_bytes

    def build_seconds(self, rates: Rates) -> float:
        """Time of a build: the model's, R_train's, and that of writing."""
        d = self.layout.size
        decomposition = (EIGH * d + 2 * min(self.sample, self.corpus.examples)) * self.curvature / rates.flops
        writing = 0.0 if rates.disk is None else self.store_bytes / rates.disk
        return self.build_tokens * self.seconds_per_token + decomposition + writing

    def query_memory(self, question: "Question") -> int:
        """Most memory of queries, beyond that of an idle process."""
        rows = 4 * question.queries * self.layout.blocks * self.layout.size
        _, _, scan = self._scan(question)
        # The scan has the queries' rows twice, whitened and not, and R_train with its whitener.
        scanning = 12 * self.curvature + max(12 * self.curvature, rows + scan)
        return self.weights + self.correction + rows + max(self.sketches + self.pass_bytes, scanning)

    def query_seconds(self, question: "Question", rates: Rates, *, cold: bool) -> float | None:
        """Time of queries, with the store on disk or in memory; None where it is on a disk of unknown speed."""
        batches, _, _ = self._scan(question)
        speed = rates.disk if cold else rates.read
        if speed is None:
            return None
        count, d, L = self.corpus.examples, self.layout.size, self.layout.blocks
        rank = min(question.queries, d)
        products = sum(2 * count * L * rank * (d + len(batch)) for batch in batches)
        reading = len(batches) * count * self.layout.row_bytes / speed
        asking = question.queries * question.tokens * self.seconds_per_token
        return asking + max(products / rates.flops, reading)

    def _scan(self, question: "Question") -> tuple[list[range], int, int]:
        return fit_scan(
            self.layout,
            question.queries,
            min(question.k, self.corpus.examples),
            mixed=True,
            directions=1,
            copies=2,
            memory=question.memory,
        )


@dataclasses.dataclass(frozen=True)
class Question:
    """Queries to plan for.

    Attributes:
        queries: Q.
        tokens: of a query.
        k: rows per query.
        memory: bytes that the scan may take.
    """

    queries: int
    tokens: int
    k: int
    memory: int
