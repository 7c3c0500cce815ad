"""Labels drawn from the model itself, which make a curvature the true Fisher and not the empirical one.

A label is found by halving: a coin for each level of a binary tree over the vocabulary says which half's mass it lies
in. The coins are a function of (seed, example, token) alone, and a choice turns over only where the coin falls within
rounding of a half's share: a batch's make-up, which moves logits by their rounding, does not move labels.
"""

import numpy as np
import torch

from trackstar.gradients.examples import IGNORED, Encoded

LEVELS = 24
"""Coins of a prediction, enough for 2²⁴ labels."""


def coins_of(example: Encoded, seed: int, index: int) -> torch.Tensor:
    """Coins of an example's predictions: (predictions that count, LEVELS) float32, uniform in [0, 1).

    Coin (t, l) is the upper 24 bits of word LEVELS·t + l of numpy's Philox (4×64, 10 rounds) with the key
    (seed, index), t being the position that the prediction is made at.
    """
    words = np.random.Philox(key=np.array([seed, index], np.uint64)).random_raw(LEVELS * len(example))
    coins = (words >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    return torch.from_numpy(coins.reshape(len(example), LEVELS)[:-1][example.labels[1:] != IGNORED])


def draw(probabilities: torch.Tensor, coins: torch.Tensor) -> torch.Tensor:
    """Labels (n,) int64 drawn from ``probabilities`` (n, V), which need not sum to 1, by ``coins`` (n, LEVELS).

    The same coins and probabilities give the same label; one of probability 0 is never drawn.
    """
    mass, halves = probabilities, []
    while mass.shape[1] > 1:
        mass = torch.nn.functional.pad(mass, (0, mass.shape[1] % 2))
        halves.append(mass)
        mass = mass[:, ::2] + mass[:, 1::2]
    labels = torch.zeros(len(probabilities), 1, dtype=torch.long, device=probabilities.device)
    for level, mass in enumerate(reversed(halves)):
        left, right = mass.gather(1, 2 * labels), mass.gather(1, 2 * labels + 1)
        labels = 2 * labels + (coins[:, level : level + 1] * (left + right) >= left)
    return labels[:, 0]


def sampled_nll(logits: torch.Tensor, coins: torch.Tensor) -> torch.Tensor:
    """The gradient of Σ −log p(label) by the logits, for labels drawn from p: an output function of losses.py.

    In the place of labels it takes the coins that draw them.
    """
    gradient = torch.softmax(logits, dim=1, out=logits)
    labels = draw(gradient, coins)
    return gradient.scatter_add_(1, labels[:, None], -torch.ones_like(gradient[:, :1]))
