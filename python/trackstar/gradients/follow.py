"""Seeing the matrices that a model's own code multiplies, and with which examples' tokens.

Experts, fused attention and routers multiply with parameters outside of any linear layer's call, and experts do so with
the tokens routed to them, in no order. So the functions are watched that the model calls: a product is with the
parameter in whose memory its matrix lies, whatever view of it the code took, and the rows that it multiplies tell where
they come from (see origins.py).
"""

import dataclasses
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from trackstar.gradients.origins import COPIES, MOVES, Layout, set_origin
from trackstar.gradients.weights import Use, Weight

PRODUCTS = frozenset(
    "linear matmul __matmul__ mm bmm addmm baddbmm grouped_mm _grouped_mm grouped_mm_fallback".split()
)
"""Functions that multiply."""

_COPY_OF = "_trackstar_copy_of"


class Listener(Protocol):
    """Who is told what a :class:`Follower` sees."""

    def layout(self) -> Layout:
        """The layout of the pass under way."""

    def start(self, output: torch.Tensor, names: Iterable[str]) -> torch.Tensor:
        """The weights of these names made this output; returns it, differentiable."""

    def use(self, use: Use) -> None:
        """A weight's gradient, in the backward pass."""

    def use_table(
        self, weight: Weight, ids: torch.Tensor, padding: int | None, layout: Layout, grad: torch.Tensor
    ) -> None:
        """An embedding's gradient, in the backward pass."""


@dataclasses.dataclass(frozen=True)
class _Parameter:
    tensor: torch.Tensor
    weights: dict[int, list[Weight]]
    """By expert; 0 where there are none."""

    def place(self, matrix: torch.Tensor) -> "_Place | None":
        """Where a matrix, or a stack, lies in this parameter; None where it does not, or is a slice of columns."""
        *outer, rows, cols = self.tensor.shape
        *_, row_stride, col_stride = self.tensor.stride()
        expert_stride = self.tensor.stride(0) if outer else self.tensor.numel()
        if outer and matrix.dim() == 3 and len(matrix) > 1 and matrix.stride(0) != expert_stride:
            return None
        offset = int(matrix.storage_offset() - self.tensor.storage_offset())
        expert, offset = divmod(offset, max(expert_stride, 1))
        if row_stride >= col_stride:
            row, offset = divmod(offset, row_stride)
            col = offset // col_stride
        else:
            col, offset = divmod(offset, col_stride)
            row = offset // row_stride
        if col or not 0 <= expert < (outer[0] if outer else 1):
            return None
        (a, b), (a_stride, b_stride) = matrix.shape[-2:], matrix.stride()[-2:]
        for flipped, count, width, strides in (
            (False, a, b, (a_stride, b_stride)),
            (True, b, a, (b_stride, a_stride)),
        ):
            same = all(
                size == 1 or got == wanted
                for size, got, wanted in zip((count, width), strides, (row_stride, col_stride), strict=True)
            )
            if same and width == cols and row + count <= rows:
                return _Place(self, expert, slice(row, row + count), flipped)
        return None


@dataclasses.dataclass(frozen=True)
class _Place:
    """Rows of a parameter's matrices, from that of ``expert`` on; ``flipped`` where they are seen transposed."""

    parameter: _Parameter
    expert: int
    rows: slice
    flipped: bool

    @property
    def all_rows(self) -> bool:
        """Whether the matrices are whole."""
        return self.rows.stop - self.rows.start == self.parameter.tensor.shape[-2]

    def weights(self, count: int) -> list[Weight]:
        """The weights of ``count`` matrices from ``expert`` on."""
        experts = range(self.expert, self.expert + count)
        return [weight for expert in experts for weight in self.parameter.weights.get(expert, ())]


@dataclasses.dataclass(frozen=True)
class _Product:
    """y = x Mᵀ with M (o, i) where ``linear``, else y = x M with M (i, o); M is that of ``expert`` from ``place`` on.

    Attributes:
        x: (n, i).
        owners: (n,) int32, the example that each row belongs to.
        examples: B.
    """

    place: _Place
    linear: bool
    expert: int
    x: torch.Tensor
    owners: torch.Tensor
    examples: int

    def uses(self, grad: torch.Tensor) -> Iterator[Use]:
        """What the gradient (n, o) by y tells of every weight."""
        x, owners = self.x, self.owners
        if (owners.diff() < 0).any():
            owners, order = owners.sort(stable=True)
            x, grad = x[order], grad[order]
        counts = torch.bincount(owners, minlength=self.examples).cpu()
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        # Rows of the parameter go with outputs of the product, or with inputs.
        by_row, by_col = (grad, x) if self.linear != self.place.flipped else (x, grad)
        for weight in self.place.parameter.weights.get(self.expert, ()):
            if weight.kind == "bias":
                yield Use.of_vector(weight, grad, offsets)
                continue
            outputs, inputs = (by_col, by_row) if weight.transposed else (by_row, by_col)
            rows = self.place.rows
            if self.place.all_rows:
                yield Use(
                    weight, inputs, outputs if weight.rows is None else outputs[:, weight.rows], offsets
                )
            elif weight.rows is None:
                yield Use(weight, inputs, outputs, offsets, rows)
            else:
                own = torch.arange(len(self.place.parameter.tensor))[weight.rows]
                inside = ((own >= rows.start) & (own < rows.stop)).nonzero().flatten()
                yield Use(weight, inputs, outputs[:, own[inside] - rows.start], offsets, inside)


class Follower(TorchFunctionMode):
    """Inside a ``with`` block, tells a listener the gradient of every watched weight that a product is with.

    Attributes:
        unfollowed: {weight: name of a function that read it, of which a gradient is not known}.

    Raises, from the model's own code:
        RuntimeError: a watched weight multiplies rows of which it is not known which examples they belong to.
    """

    def __init__(self, weights: Iterable[Weight], listener: Listener) -> None:
        super().__init__()
        self._weights = list(weights)
        self._listener = listener
        self._parameters: dict[int, list[_Parameter]] = {}
        self.unfollowed: dict[str, str] = {}

    def __enter__(self) -> "Follower":
        self._parameters = {}
        known: dict[torch.Tensor, _Parameter] = {}
        for weight in self._weights:
            tensor = weight.module.get_parameter(_multiplied(weight))
            if tensor not in known:
                known[tensor] = _Parameter(tensor, {})
                storage = tensor.untyped_storage().data_ptr()
                self._parameters.setdefault(storage, []).append(known[tensor])
            known[tensor].weights.setdefault(weight.expert or 0, []).append(weight)
        super().__enter__()
        return self

    def __torch_function__(
        self,
        function: Callable[..., Any],
        kinds: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if function is functional.multi_head_attention_forward:
            with self:
                return _attention(*args, **kwargs)
        output = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name == "__get__":  # of a property, such as .T
            name = getattr(getattr(function, "__self__", None), "__name__", "")
        if name in PRODUCTS:
            return self._product(name, args, kwargs, output)
        if name == "embedding":
            return self._embedding(output, *args, **kwargs)
        self._listener.layout().trace(name, function, args, kwargs, output)
        if name in MOVES | COPIES:
            self._trace_matrix(name, function, args, kwargs, output)
        self._note_reading(name, args, output)
        return output

    def _note_reading(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        """Remember who read a watched parameter other than through a view or a converted copy."""
        if not isinstance(output, torch.Tensor) or hasattr(output, _COPY_OF):
            return
        for read in args:
            place = self._place(read) if isinstance(read, torch.nn.Parameter) else None
            if place is None or output.untyped_storage().data_ptr() == read.untyped_storage().data_ptr():
                continue
            for weights in place.parameter.weights.values():
                self.unfollowed.update((weight.name, name) for weight in weights)

    def _trace_matrix(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        """Remember what a converted matrix is a copy of, and views of the copy."""
        if not isinstance(output, torch.Tensor) or not args or output is args[0]:
            return
        original = getattr(args[0], _COPY_OF, None)
        if original is not None:
            setattr(output, _COPY_OF, function(original, *args[1:], **kwargs) if name in MOVES else original)
        elif name in COPIES and self._place(args[0]) is not None:
            setattr(output, _COPY_OF, args[0])

    def _place(self, matrix: Any) -> _Place | None:
        """Where a matrix lies in a watched parameter."""
        if not isinstance(matrix, torch.Tensor):
            return None
        matrix = getattr(matrix, _COPY_OF, matrix)
        if matrix.dim() not in (2, 3) or matrix.layout is not torch.strided:
            return None
        candidates = self._parameters.get(matrix.untyped_storage().data_ptr(), ())
        return next((place for p in candidates if (place := p.place(matrix)) is not None), None)

    def _embedding(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        weight: torch.Tensor,
        padding_idx: int | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        place = self._place(weight)
        if place is None:
            return output
        weights, layout = place.parameter.weights[0], self._listener.layout()
        output = self._listener.start(output, [w.name for w in weights])

        def tell(grad: torch.Tensor) -> None:
            for seen in weights:
                self._listener.use_table(seen, input, padding_idx, layout, grad)

        output.register_hook(tell)
        return output

    def _product(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        x, matrix = _operands(name, args, kwargs)
        place, linear, turned = self._place(matrix), name == "linear", False
        if place is None and not linear and (place := self._place(x)) is not None:
            # M x, whose features are along the last dimension but one.
            x, matrix, linear, turned = matrix, x, True, True
        layout = self._listener.layout()
        if place is None:
            layout.trace_product(x, matrix, output)
            return output
        names = [w.name for w in place.weights(len(matrix) if matrix.dim() == 3 else 1)]
        if not names:
            return output
        origin = layout.known_origin(x)
        if origin is None:
            raise RuntimeError(
                f"{names[0]!r} multiplies a tensor of shape {tuple(x.shape)}, and it is not known which example each "
                "of its rows belongs to"
            )
        output = self._listener.start(output, names)
        shape = output.shape
        if turned:
            set_origin(output, origin.through(lambda numbers: numbers[..., :1, :].expand(shape)))
        else:
            set_origin(output, origin.like(shape))
        owners = (origin.through(lambda numbers: numbers.mT) if turned else origin).rows()
        rows = (x.mT if turned else x).detach().flatten(0, -2)
        parts = _parts(name, args, kwargs, matrix, len(rows))
        version, examples = x._version, origin.examples

        def tell(grad: torch.Tensor) -> None:
            if x._version != version:
                raise RuntimeError(
                    f"the input of {names[0]!r} was overwritten in place before the backward pass"
                )
            by_rows = (grad.mT if turned else grad).flatten(0, -2)
            with torch.no_grad():
                for expert, part in enumerate(parts, start=place.expert):
                    if part.stop > part.start:
                        product = _Product(place, linear, expert, rows[part], owners[part], examples)
                        for use in product.uses(by_rows[part]):
                            self._listener.use(use)

        output.register_hook(tell)
        return output


def _multiplied(weight: Weight) -> str:
    """The field of the matrix that a weight is seen with: its own, or a bias's neighbour."""
    if weight.kind != "bias":
        return weight.field
    if weight.field in ("bias", "in_proj_bias"):
        return weight.field.replace("bias", "weight")
    return weight.field.removesuffix("_bias")


def _operands(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two tensors that a function multiplies."""
    given = [*args, *(kwargs[key] for key in ("input", "other", "mat2", "weight", "mat_b") if key in kwargs)]
    first = 1 if name in ("addmm", "baddbmm") else 0
    return given[first], given[first + 1]


def _parts(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], matrix: torch.Tensor, count: int
) -> list[slice]:
    """Which of ``count`` rows meet each matrix of a stack."""
    if matrix.dim() == 2:
        return [slice(0, count)]
    if "grouped" in name:
        stops = kwargs["offs"].tolist() if "offs" in kwargs else args[2].tolist()
    else:
        stops = [(i + 1) * count // len(matrix) for i in range(len(matrix))]
    return [slice(start, stop) for start, stop in itertools.pairwise([0, *stops])]


# torch's own, without the shortcut by which it would show itself to the follower as one function.
_original: Any = functional.multi_head_attention_forward
_attention = types.FunctionType(
    _original.__code__,
    {**vars(functional), "has_torch_function": lambda tensors: False},
    _original.__name__,
    _original.__defaults__,
    _original.__closure__,
)
_attention.__kwdefaults__ = _original.__kwdefaults__
