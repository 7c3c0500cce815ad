"""What is captured and how it is sketched: the part of a store's identity that the user chooses."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from trackstar.gradients.blocks import Blocks, group_weights, number_blocks
from trackstar.gradients.modules import ALSO, Parts, select_weights
from trackstar.gradients.weights import Weight
from trackstar_kernels import projection_matrix
from trackstar_kernels.sketch import KINDS


@dataclasses.dataclass(frozen=True)
class SketchSpec:
    """Sizes and randomness of the two-sided projection, and the grouping of modules into blocks.

    Attributes:
        seed: seed of every projection, 0 ≤ seed < 2⁶⁴.
        sketch: p = q; a module's gradient (O, I) becomes sketch × sketch numbers.
        blocks: what makes up a block, inside which the projected gradients of the modules add: "module" (each is a
            block of its own); a number of layer blocks, contiguous layers with attention and MLP apart; or {pattern:
            group} with the group of every module that is captured, by shell patterns.
        kind: "rademacher" or "gaussian", both projections alike; or "countsketch", which makes the exact
            correction nearly free of the sketch's size: CountSketch on the left, Rademacher on the right.
        modules: shell patterns of what to capture ("*.mlp.*"), and, after a "!", of what to leave out. None takes all
            attention and MLP matrices; of a model with PEFT adapters, those of the active adapters alone.
        also: what to capture besides matrices, within what ``modules`` matches: any of "embeddings", "lm_head",
            "biases" and "norms".
        split: {pattern: parts} of fused matrices, such as that of query, key and value, whose parts count as modules
            of their own, "<name>.<number>". An int is a number of equal parts (heads). A list has the rows of each
            part; where they sum to less than all rows, they repeat: [64, 64, 64] cuts a matrix of 12 heads, each
            with query, key and value of 64 rows, into all queries, all keys and all values.
    """

    seed: int = 0
    sketch: int = 16
    blocks: Blocks = "module"
    kind: str = "rademacher"
    modules: Sequence[str] | None = None
    also: Sequence[str] = ()
    split: Mapping[str, Parts] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.sketch, bool) or not isinstance(self.sketch, int) or self.sketch < 1:
            raise ValueError(f"sketch must be an int of at least 1, got {self.sketch!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be an int from 0 to 2**64 - 1, got {self.seed!r}")
        object.__setattr__(self, "blocks", _check_blocks(self.blocks))
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if self.modules is not None:
            if isinstance(self.modules, str) or not self.modules:
                raise ValueError(f"modules must be None or a list of name patterns, got {self.modules!r}")
            object.__setattr__(self, "modules", tuple(self.modules))
        if isinstance(self.also, str) or not set(self.also) <= set(ALSO):
            raise ValueError(f"also must be a list of any of {', '.join(ALSO)}; got {self.also!r}")
        object.__setattr__(self, "also", tuple(self.also))
        if not isinstance(self.split, Mapping):
            raise ValueError(f"split must map name patterns to parts, got {self.split!r}")
        object.__setattr__(self, "split", {p: _check_parts(p, parts) for p, parts in self.split.items()})

    @property
    def block_size(self) -> int:
        """d, the numbers a block holds: sketch²."""
        return self.sketch**2

    def projections(
        self, module_name: str, in_features: int, out_features: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Left (sketch, O) and right (sketch, I) projections of a module, float32.

        The streams are the first eight bytes, little-endian, of BLAKE2b of "<module name>/left" and ".../right":
        they depend on nothing but the name, so that any subset of modules is projected alike.
        """
        right_kind = "rademacher" if self.kind == "countsketch" else self.kind
        left, right = (
            projection_matrix(
                self.sketch, size, seed=self.seed, stream=_stream(f"{module_name}/{side}"), kind=kind
            )
            for side, size, kind in (("left", out_features, self.kind), ("right", in_features, right_kind))
        )
        return left, right

    def vector_projection(self, name: str, features: int) -> torch.Tensor:
        """Projection (d, features) of a vector, a bias or norm, float32; its stream is that of a left projection."""
        return projection_matrix(
            self.block_size, features, seed=self.seed, stream=_stream(f"{name}/left"), kind=self.kind
        )

    def weights(self, model: nn.Module) -> dict[str, Weight]:
        """What is captured of a model, by name, in the order of ``model.named_modules()``.

        Raises:
            ValueError: a field does not fit the model.
        """
        return select_weights(model, self.modules, also=self.also, split=self.split)

    def block_of(self, model: nn.Module) -> dict[str, int]:
        """Block index of everything that is captured, in the order of ``model.named_modules()``."""
        return number_blocks(group_weights(list(self.weights(model)), self.blocks))

    def block_names(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the L blocks: the module's, the layers', or the user's own."""
        return tuple(dict.fromkeys(group_weights(list(self.weights(model)), self.blocks).values()))

    def as_dict(self) -> dict[str, object]:
        """The fields as JSON values."""
        fields = dataclasses.asdict(self)
        fields["modules"] = None if self.modules is None else list(self.modules)
        fields["also"] = list(self.also)
        return fields


def _check_blocks(blocks: Blocks) -> Blocks:
    if isinstance(blocks, Mapping):
        if not blocks or not all(isinstance(text, str) and text for pair in blocks.items() for text in pair):
            raise ValueError(f"blocks must map patterns to names of groups, got {blocks!r}")
        return dict(blocks)
    whole = isinstance(blocks, int) and not isinstance(blocks, bool)
    if blocks != "module" and not (whole and blocks >= 1):  # type: ignore[operator]
        raise ValueError(
            f'blocks must be "module" or an int of at least 1, or map patterns to groups; got {blocks!r}'
        )
    return blocks


def _check_parts(pattern: str, parts: Parts) -> Parts:
    sizes = [parts] if isinstance(parts, int) else list(parts)
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(
            f"split of {pattern!r} must be a number of parts or a list of their rows, got {parts!r}"
        )
    return parts if isinstance(parts, int) else sizes


def _stream(label: str) -> int:
    return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little")
