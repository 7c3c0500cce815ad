"""Which example each row of an activation belongs to, through whatever a model's own code does to rows.

A tensor's origin is told from the function that made it. Functions that move elements are done again on a tensor of
example numbers, though only where somebody asks. Any other function is taken to work row by row if its output has the
rows of an input, and to lose track of them if not.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

MOVES = frozenset(
    """
    __getitem__ index_select gather take_along_dim select narrow view reshape flatten unflatten ravel squeeze unsqueeze
    expand expand_as broadcast_to repeat repeat_interleave tile permute transpose swapaxes swapdims movedim moveaxis t T
    mT split split_with_sizes chunk tensor_split unbind roll flip
    """.split()
)
"""Functions whose outputs are elements of their first argument, in other places."""

COPIES = frozenset("contiguous clone to float half bfloat16 double type type_as cpu cuda".split())
"""Functions whose output has the elements of their first argument in the same places."""

JOINS = frozenset("cat concat concatenate stack hstack vstack".split())
"""Functions whose output has the elements of all tensors in their first argument."""

WRITES = frozenset(
    """
    index_add index_add_ index_copy index_copy_ index_put index_put_ scatter scatter_ scatter_add scatter_add_
    scatter_reduce scatter_reduce_ masked_scatter masked_scatter_ __setitem__
    """.split()
)
"""Functions that write into their first argument, whose rows go on belonging to the examples they did."""

MIXES = frozenset("sort argsort topk cumsum cumprod cummax cummin einsum".split())
"""Functions that may keep the shape of an argument but not the order of its rows."""

_ATTRIBUTE = "_trackstar_origin"


class Origin:
    """Which example each element of a tensor belongs to.

    Attributes:
        examples: how many examples there are.
    """

    def __init__(self, examples: int, find: Callable[[], torch.Tensor]) -> None:
        self.examples = examples
        self._find = find
        self._numbers: torch.Tensor | None = None

    def numbers(self) -> torch.Tensor:
        """Example numbers, int32, in the tensor's shape."""
        if self._numbers is None:
            self._numbers = self._find()
        return self._numbers

    def rows(self) -> torch.Tensor:
        """Example numbers of the rows, (n,) int32: what stands along the last dimension is one row."""
        return self.numbers()[..., 0].flatten()

    def like(self, shape: Sequence[int]) -> "Origin":
        """Origin of a tensor with the same rows, of another length."""
        return Origin(self.examples, lambda: self.numbers()[..., :1].expand(shape))

    def through(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Origin":
        """Origin of what ``function`` made of the tensor, by moving its elements."""
        return Origin(self.examples, lambda: function(self.numbers()))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the examples of a pass are in its activations.

    Attributes:
        offsets: (B + 1,) int64, where packed examples begin along the second dimension, and the end; None where
            each example is an element of the first dimension.
        shape: (B, T), or (1, ΣT) of packed examples; None where it is not known.
    """

    offsets: torch.Tensor | None = None
    shape: tuple[int, int] | None = None

    def root(self, tensor: torch.Tensor, *, lost: bool) -> Origin | None:
        """Origin of a tensor by where examples are; None where that does not tell.

        Args:
            tensor: what no function is known to have made.
            lost: whether one has, which lost track of the rows: then the whole shape must be that of the pass.
        """
        shape = tuple(tensor.shape)
        if self.offsets is not None:
            if shape[:2] != (1, int(self.offsets[-1])):
                return None
            counts = self.offsets.diff()
            numbers = torch.repeat_interleave(torch.arange(len(counts)), counts)[None]
        else:
            if self.shape is None:
                known = not lost and len(shape) >= 2
            else:
                known = (
                    len(shape) >= 3 and shape[0] == self.shape[0] and (not lost or shape[1] == self.shape[1])
                )
            if not known:
                return None
            counts = numbers = torch.arange(shape[0])
        numbers = numbers.to(tensor.device, torch.int32)
        numbers = numbers.reshape(*numbers.shape, *[1] * (len(shape) - numbers.dim()))
        return Origin(len(counts), lambda: numbers.expand(shape))

    def origin(self, tensor: torch.Tensor) -> Origin | None:
        """Origin of a tensor, None where it is not known."""
        found = getattr(tensor, _ATTRIBUTE, None)
        if found is None and not isinstance(tensor, nn.Parameter):
            found = self.root(tensor, lost=hasattr(tensor, _ATTRIBUTE))
        return found

    def trace(
        self,
        name: str,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        """Keep the origin of what ``function``, of this name, made of its arguments."""
        several = isinstance(output, tuple | list)
        outputs = [(i, o) for i, o in enumerate(output if several else [output]) if _is_activation(o)]
        if not outputs or not args:
            return
        first = args[0]
        if name in MOVES | COPIES and isinstance(first, torch.Tensor):
            source = self.origin(first)
            for i, made in outputs:
                if made is first:
                    continue
                found = source
                if source is not None and name in MOVES:
                    found = source.through(_again(name, function, args, kwargs, i if several else None))
                set_origin(made, found)
        elif name in JOINS:
            sources = [self.origin(tensor) for tensor in first]
            known = [source for source in sources if source is not None]
            found = None
            if known and len(known) == len(sources):
                rest = args[1:]
                found = Origin(
                    known[0].examples, lambda: function([s.numbers() for s in known], *rest, **kwargs)
                )
            set_origin(output, found)
        elif name in WRITES:
            if isinstance(output, torch.Tensor) and output is not first:
                set_origin(output, self.origin(first))
        else:
            self._trace_rows(name, [*args, *kwargs.values()], [made for _, made in outputs])

    def _trace_rows(self, name: str, arguments: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
        given = [tensor for tensor in _tensors(arguments) if not isinstance(tensor, nn.Parameter)]
        for made in outputs:
            sources = (self.origin(t) for t in given if t.dim() and t.shape[:-1] == made.shape[:-1])
            found = next((source for source in sources if source is not None), None)
            if any(made is tensor for tensor in given):  # written in place, row by row
                continue
            if found is not None and name not in MIXES:
                set_origin(made, found.like(made.shape))
            elif given:
                set_origin(made, None)


def set_origin(tensor: torch.Tensor, origin: Origin | None) -> None:
    """Keep a tensor's origin with it; None where it is not known."""
    setattr(tensor, _ATTRIBUTE, origin)


def _again(
    name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], place: int | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same move of another tensor; of several outputs, the one at ``place``."""
    rest = args[1:]
    # The numbers of a contiguous tensor need not be contiguous themselves.
    move = torch.Tensor.reshape if name == "view" else function

    def move_again(numbers: torch.Tensor) -> torch.Tensor:
        moved = move(numbers, *rest, **kwargs)
        return moved if place is None else moved[place]

    return move_again


def _is_activation(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if _is_activation(value):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
