"""What running a model costs, found by running it on tensors that have shapes and no numbers."""

import dataclasses
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from trackstar.gradients.examples import Encoded
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.tap import GradientTap
from trackstar.gradients.weights import Weight


@dataclasses.dataclass(frozen=True)
class PassCost:
    """Cost of one lean pass over a batch, without the projections.

    Attributes:
        bytes: most memory in use at a time, beyond the weights and the batch itself.
        flops: operations of its matrix products, a multiplication and an addition counted as two.
    """

    bytes: int
    flops: int


def model_of_shapes(folder: Path) -> Any:
    """The float32 model that a folder's config.json describes, without numbers: no weight is read, or takes memory."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def dry_run(model: Any, weights: Mapping[str, Weight], examples: Sequence[Encoded]) -> PassCost:
    """The cost of a lean pass over these examples in one batch.

    Shortcuts of the pass that only weights could show to be safe are taken for granted.

    Args:
        model: from :func:`model_of_shapes`.
        weights: those whose gradients are captured.
        examples: a batch.

    Raises:
        ValueError: the model does something that depends on its numbers.
    """
    mode = next(model.parameters()).fake_mode
    # Where tokens are routed to depends on numbers, so what is followed is left to the graph that others start.
    hooked = {name: weight for name, weight in weights.items() if not weight.followed}
    # torch writes its own account of what cannot run on shapes; the error says it.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with mode:
            lean = LeanPass(model, [weight.module for weight in weights.values()], has_weights=False)
        batch = lean.arrange(examples)
        tensors = {
            field.name: mode.from_tensor(value)
            for field in dataclasses.fields(batch)
            if isinstance(value := getattr(batch, field.name), torch.Tensor)
        }
        counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
        with mode, lean, counter, MemoryMeter() as memory, GradientTap(hooked, lambda use: None):
            lean.run(dataclasses.replace(batch, **tensors))
    except Exception as error:
        raise ValueError(
            f"model must run on shapes alone to be planned for; {type(model).__name__} does not: "
            f"{type(error).__name__}: {error}"
        ) from None
    finally:
        logger.setLevel(level)
    return PassCost(memory.peak, counter.get_total_flops())


class MemoryMeter(TorchDispatchMode):
    """Follows the memory of the tensors that operations inside the block return.

    Attributes:
        peak: most bytes of them that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # What shares an argument's memory (a view, a result in place) is counted already, or is a weight.
        known = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known | self._alive:
                    self._alive.add(storage._cdata)
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return out

    def _freed(self, storage: int, size: int) -> None:
        self._alive.discard(storage)
        self._now -= size


def _causal_attention(query: Sequence[int], key: Sequence[int], *rest: Any, **options: Any) -> int:
    """Two products of (T, T) by the head size, half of which a causal kernel leaves out."""
    batch, heads, tokens, size = query
    return 2 * batch * heads * tokens * key[2] * size


def _causal_attention_backward(
    grad: Any, query: Sequence[int], key: Sequence[int], *rest: Any, **options: Any
) -> int:
    """Five products, the scores among them anew."""
    return 5 * _causal_attention(query, key) // 2


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _causal_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _causal_attention_backward,
}
"""What torch's counter does not know."""
