"""Output functions of a causal language model: what a row is the gradient of.

Each is written as its gradient by the logits, in closed form, so that a pass can go through the vocabulary a
chunk of tokens at a time and keep no logits.
"""

from collections.abc import Callable

import torch

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits (n, V) float32, labels (n,) int64) to the gradient (n, V) of the output function, summed over the n
predictions, by the logits; overwrites the logits."""


def nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the labels' negative log-probabilities, Σ −log p(label)."""
    gradient = torch.softmax(logits, dim=1, out=logits)
    return gradient.scatter_add_(1, labels[:, None], -torch.ones_like(gradient[:, :1]))


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the log-odds against the labels, Σ −log(p / (1 − p)) with p = p(label)."""
    others = logits.scatter_(1, labels[:, None], -torch.inf)
    gradient = torch.softmax(others, dim=1, out=others)
    return gradient.scatter_(1, labels[:, None], -1.0)


def logit(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the labels' negated logits, Σ −logit(label)."""
    return logits.zero_().scatter_(1, labels[:, None], -1.0)


LOSSES: dict[str, Loss] = {"loss": nll, "margin": margin, "logit": logit}


def nll_values(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log p(label) of each prediction."""
    return logits.logsumexp(1) + logit_values(logits, labels)


def margin_values(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log(p / (1 − p)) of each prediction, p = p(label)."""
    return logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1) + logit_values(logits, labels)


def logit_values(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−logit(label) of each prediction."""
    return -logits.gather(1, labels[:, None])[:, 0]


VALUES: dict[str, Loss] = {"loss": nll_values, "margin": margin_values, "logit": logit_values}
"""The output functions themselves: (logits (n, V), labels (n,)) to the value (n,) at each of the n predictions."""


def output_function(name: str) -> Loss:
    """The output function of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in LOSSES:
        raise ValueError(f"output must be one of {', '.join(LOSSES)}; got {name!r}")
    return LOSSES[name]
