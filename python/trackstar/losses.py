"""Output functions of a causal language model: what a row is the gradient of."""

from collections.abc import Callable

import torch
from torch.nn import functional

from trackstar.examples import IGNORED

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _aligned(labels: torch.Tensor) -> torch.Tensor:
    """Labels moved to the positions that predict them: the labels move, as the logits are far larger."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _counted(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, V) float32 and labels (n,) of the predictions that count."""
    labels = _aligned(labels)
    counted = labels != IGNORED
    return logits[counted].float(), labels[counted]


def nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the labels' negative log-probabilities, −Σ log p(label).

    Args:
        logits: (B, T, V), as a causal language model returns them; position t predicts label t + 1.
        labels: (B, T) int64, −100 where the prediction does not count.
    """
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), _aligned(labels).flatten(), ignore_index=IGNORED, reduction="sum"
    )


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the log-odds against the labels, −Σ log(p / (1 − p)); arguments as in :func:`nll`."""
    logits, labels = _counted(logits, labels)
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1)
    return (others - own).sum()


def logit(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the labels' negated logits; arguments as in :func:`nll`."""
    logits, labels = _counted(logits, labels)
    return -logits.gather(1, labels[:, None]).sum()


LOSSES: dict[str, Loss] = {"loss": nll, "margin": margin, "logit": logit}
