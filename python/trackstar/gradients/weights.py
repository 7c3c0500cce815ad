"""What can be captured of a model: its parameters, whole or in parts, each seen as a matrix of fan-out × fan-in."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

Rows = slice | torch.Tensor
"""Some of a matrix's rows: a range, or int64 positions."""


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A parameter whose gradient is captured, or a part of one: an expert, or some rows of a fused matrix.

    Everything is a matrix of fan-out O × fan-in I. A vector (a bias, a norm's scale) is a matrix of one column; an
    embedding is a linear layer whose inputs are one-hot, fan-in V.

    Attributes:
        name: what blocks, projections and corrections call it.
        module: the module that owns the parameter.
        parameter: the parameter's name in the model.
        kind: "matrix", "embedding", "bias" or "norm".
        shape: (O, I).
        expert: which of the matrices in a parameter of three dimensions (or biases in one of two); else None.
        transposed: whether the parameter holds the matrix as (I, O).
        rows: the rows of the matrix that this part has; None for all.
        usual: whether it is an attention or MLP matrix as far as can be told: of a linear layer, an expert or
            nn.MultiheadAttention.
        followed: whether its module's inputs and outputs do not tell the gradient, so that the functions must be
            watched that the model's code calls (see follow.py).
    """

    name: str
    module: nn.Module
    parameter: str
    kind: str
    shape: tuple[int, int]
    expert: int | None = None
    transposed: bool = False
    rows: Rows | None = None
    usual: bool = False
    followed: bool = False

    @property
    def group(self) -> str:
        """Weights of one group share it: some may do without a gradient, as experts that no token is routed to."""
        if self.expert is not None:
            return self.parameter
        head, *tail = re.split(r"(?i)(?<=expert)", self.name, maxsplit=1)
        return head + re.sub(r"(?<=[._])\d+", "*", "".join(tail), count=1)

    @property
    def field(self) -> str:
        """The parameter's name in its module."""
        return self.parameter.rpartition(".")[2]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The (O, I) that is this weight's, of a tensor shaped like the parameter: itself, its gradient, its V."""
        part = tensor if self.expert is None else tensor[self.expert]
        if self.kind in ("bias", "norm"):
            return part.reshape(-1, 1)
        if self.transposed:
            part = part.T
        return part if self.rows is None else part[self.rows]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer with its weight stored (fan-in, fan-out).

    Told by its name, so that plain torch models never import transformers.
    """
    return any(_is_conv1d(c) for c in type(module).__mro__)


def _is_conv1d(cls: type) -> bool:
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def weights_of(model: nn.Module) -> Iterator[Weight]:
    """Every weight that can be captured, in the order of ``model.named_modules()``, fused matrices not split.

    - The matrix and bias of each nn.Linear and transformers' Conv1D.
    - The table of each nn.Embedding.
    - The matrices, and their biases, that experts of a mixture keep in one parameter: a weight for each expert.
    - The matrices of nn.MultiheadAttention.
    - The vectors of every module that is called a norm.
    - Other parameters of two or three dimensions, which their module's own code may multiply with.
    """
    # Their parents never call these, but read their weights.
    uncalled = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            yield from _linear(path, module, id(module) in uncalled)
        elif isinstance(module, nn.Embedding):
            shape = (module.embedding_dim, module.num_embeddings)
            followed = type(module).forward is not nn.Embedding.forward
            name = _join(path, "weight")
            yield Weight(path, module, name, "embedding", shape, transposed=True, followed=followed)
        elif "norm" in type(module).__name__.lower():
            yield from _norm(path, module)
        elif not isinstance(module, _ConvNd):
            yield from _own(path, module)


def _linear(path: str, module: Any, uncalled: bool) -> Iterator[Weight]:
    conv1d = is_conv1d(module)
    if conv1d:
        shape = tuple(module.weight.shape[::-1])
    else:
        shape = (module.out_features, module.in_features)
    known: Any = next(c for c in type(module).__mro__ if c is nn.Linear or _is_conv1d(c))
    # An expert sees some of the tokens, without a batch dimension to tell whose.
    followed = uncalled or type(module).forward is not known.forward or is_expert(path)
    name, bias = _join(path, "weight"), _join(path, "bias")
    yield Weight(path, module, name, "matrix", shape, transposed=conv1d, usual=True, followed=followed)
    if module.bias is not None:
        yield Weight(bias, module, bias, "bias", (shape[0], 1), followed=followed)


def _norm(path: str, module: nn.Module) -> Iterator[Weight]:
    for field, p in module.named_parameters(recurse=False):
        name = _join(path, field)
        yield Weight(path if field == "weight" else name, module, name, "norm", (p.numel(), 1))


def _own(path: str, module: nn.Module) -> Iterator[Weight]:
    """Weights among the parameters of a module that is no layer of a known type."""
    fields = dict(module.named_parameters(recurse=False))
    matrices = {field: p for field, p in fields.items() if p.dim() in (2, 3) and "bias" not in field}
    usual = is_expert(path) or is_expert(type(module).__name__) or isinstance(module, nn.MultiheadAttention)
    transposed = bool(getattr(module, "is_transposed", False))  # transformers' word for it
    for expert in range(max((len(p) for p in matrices.values() if p.dim() == 3), default=0)):
        for field, p in matrices.items():
            if p.dim() == 2 or expert >= len(p):
                continue
            name = _join(path, f"{expert}" if field == "weight" else f"{expert}.{field}")
            shape = (p.shape[2], p.shape[1]) if transposed else (p.shape[1], p.shape[2])
            parameter = _join(path, field)
            yield Weight(name, module, parameter, "matrix", shape, expert, transposed, None, usual, True)
            bias = fields.get(f"{field}_bias")
            if bias is not None and bias.shape == (len(p), shape[0]):
                name, parameter = f"{name}_bias", f"{parameter}_bias"
                yield Weight(name, module, parameter, "bias", (shape[0], 1), expert, followed=True)
    for field, p in matrices.items():
        if p.dim() == 2:
            name = _join(path, field)
            called = path if field == "weight" else name
            yield Weight(called, module, name, "matrix", (len(p), p.shape[1]), usual=usual, followed=True)
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_bias is not None:
        name = _join(path, "in_proj_bias")
        yield Weight(name, module, name, "bias", (len(module.in_proj_bias), 1), followed=True)


def is_expert(name: str) -> bool:
    """Whether a name is of an expert of a mixture, or of what holds experts."""
    return "expert" in name.lower()


def _join(path: str, field: str) -> str:
    return f"{path}.{field}" if path else field


@dataclasses.dataclass(frozen=True)
class Use:
    """What a pass tells of a weight's gradient: for each example, Σ over its tokens of δ xᵀ, (O, I).

    Attributes:
        weight: whose gradient.
        activations: x, (B, T, I), or (n, I) of all examples' tokens end to end. Of an embedding the positions of the
            ones, int64 (B, T) or (n,); of a vector ones.
        output_grads: δ, (B, T, O) or (n, O).
        offsets: (B + 1,) int64 on the CPU, where each example's tokens begin in (n, …), and the end; None where
            there are B dimensions.
        rows: the rows of the gradient that δ has, where it does not have all; the others are zero.
    """

    weight: Weight
    activations: torch.Tensor
    output_grads: torch.Tensor
    offsets: torch.Tensor | None = None
    rows: Rows | None = None

    @staticmethod
    def of_vector(weight: Weight, grads: torch.Tensor, offsets: torch.Tensor | None = None) -> "Use":
        """Of a vector whose gradient is the sum of ``grads``, (B, T, O) or (n, O), over an example's tokens."""
        if offsets is None:
            sums = grads.sum(1, dtype=torch.float32)
        else:
            owners = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff()).to(grads.device)
            sums = torch.zeros(len(offsets) - 1, grads.shape[1], device=grads.device)
            sums.index_add_(0, owners, grads.float())
        return Use(weight, sums.new_ones(len(sums), 1, 1), sums[:, None])

    @property
    def name(self) -> str:
        """The weight's."""
        return self.weight.name

    @property
    def examples(self) -> int:
        """B."""
        return len(self.output_grads) if self.offsets is None else len(self.offsets) - 1

    def each(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every example's x (t, I) and δ (t, O) by itself."""
        if self.offsets is None:
            return zip(self.activations, self.output_grads, strict=True)
        lengths = self.offsets.diff().tolist()
        return zip(self.activations.split(lengths), self.output_grads.split(lengths), strict=True)
