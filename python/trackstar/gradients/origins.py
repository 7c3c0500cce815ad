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

    Args:
        examples: how many examples there are.
        find: finds the numbers; None where they prove to be unknown.
    """

    def __init__(self, examples: int, find: Callable[[], torch.Tensor | None]) -> None:
        self.examples = examples
        self._find: Callable[[], torch.Tensor | None] | None = find
        self._numbers: torch.Tensor | None = None

    def numbers(self) -> torch.Tensor | None:
        """Example numbers, int32, in the tensor's shape; None where they are unknown."""
        if self._find is not None:
            self._numbers, self._find = self._find(), None
        return self._numbers

    def rows(self) -> torch.Tensor:
        """Known example numbers of the rows, (n,) int32: what stands along the last dimension is one row."""
        numbers = self.numbers()
        if numbers is None:
            raise RuntimeError("the examples of these rows are not known")
        return numbers[..., 0].flatten()

    def through(self, function: Callable[[torch.Tensor], torch.Tensor | None]) -> "Origin":
        """Origin of what ``function`` makes of the numbers."""
        return Origin(
            self.examples, lambda: None if (numbers := self.numbers()) is None else function(numbers)
        )

    def like(self, shape: Sequence[int]) -> "Origin":
        """Origin of a tensor with the same rows, of another length."""
        return self.through(lambda numbers: numbers[..., :1].expand(shape))

    def batched(self, shape: Sequence[int]) -> "Origin":
        """Origin of a tensor made by who knows what, if each example is an element of the first dimension."""

        def find(numbers: torch.Tensor) -> torch.Tensor | None:
            first = torch.arange(self.examples, dtype=torch.int32, device=numbers.device)
            if len(numbers) != self.examples or not (numbers.flatten(1) == first[:, None]).all():
                return None
            return first.view(-1, *[1] * (len(shape) - 1)).expand(shape)

        return self.through(find)


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
            if shape[:2] != self.shape:
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

    def known_origin(self, tensor: torch.Tensor) -> Origin | None:
        """Origin of a tensor, whose numbers are known for sure; else None."""
        found = self.origin(tensor)
        if found is None or found.numbers() is None:
            found = self.root(tensor, lost=True)
        return found

    def trace_product(self, x: torch.Tensor, other: torch.Tensor, output: torch.Tensor) -> None:
        """Keep the origin of what a product made of ``x``, whose rows it has, and ``other``."""
        source = self.origin(x)
        if source is not None and x.shape[:-1] == output.shape[:-1]:
            set_origin(output, source.like(output.shape))
        else:
            sources = [source, self.origin(other)]
            set_origin(output, _batched([s for s in sources if s is not None], output))

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
            set_origin(
                output,
                self._joined([self.origin(tensor) for tensor in first], function, args, kwargs, output),
            )
        elif name in WRITES:
            if isinstance(output, torch.Tensor) and output is not first:
                set_origin(output, self.origin(first))
        else:
            self._trace_rows(name, [*args, *kwargs.values()], [made for _, made in outputs])

    def _joined(
        self,
        sources: Sequence[Origin | None],
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        made: torch.Tensor,
    ) -> Origin | None:
        known = [source for source in sources if source is not None]
        if not known:
            return None
        if len(known) < len(sources):  # a learned token before those of each example
            return _batched(known, made)

        def find() -> torch.Tensor | None:
            parts = [source.numbers() for source in known]
            return None if any(part is None for part in parts) else function(parts, *args[1:], **kwargs)

        return Origin(known[0].examples, find)

    def _trace_rows(self, name: str, arguments: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
        given = [tensor for tensor in _tensors(arguments) if not isinstance(tensor, nn.Parameter)]
        known = [(tuple(t.shape[:-1]), source) for t in given if (source := self.origin(t)) is not None]
        for made in outputs:
            if any(made is tensor for tensor in given):  # written in place, row by row
                continue
            of = tuple(made.shape[:-1])
            # Several times over, where it was broadcast.
            found = next((source for rows, source in known if rows and of[-len(rows) :] == rows), None)
            if found is not None and name not in MIXES:
                set_origin(made, found.like(made.shape))
            else:
                set_origin(made, _batched([source for _, source in known], made))


def _batched(sources: Sequence[Origin], made: torch.Tensor) -> Origin | None:
    return next((s.batched(made.shape) for s in sources if made.dim() > 1 and s.examples == len(made)), None)


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
