"""The codes of int4 that lose least.

The two codes before a code say which 16 of the 32 levels it chooses from (:data:`trackstar_kernels._codes.LEVEL_SETS`).
So the codes of a group are a path through a trellis, whose four states are the lowest bits of the last two codes, and
Viterbi's algorithm finds the best of all paths.

In ascending order the levels belong to subsets 0, 1, 2, 3, 0, 1, and so on. After codes with lowest bits x, the last
one's, and y, a code with lowest bit b stands for a level of subset x + 2 (b xor y).

Source: Marcellin and Fischer, Trellis coded quantization of memoryless and Gauss-Markov sources, IEEE Transactions on
Communications 38 (1990), with Ungerboeck's code of four states.
"""

import torch

from trackstar_kernels._codes import GROUP, LEVEL_SETS, LEVELS, MULTIPLIERS, pack_int4

TRIED = (1, 0, -1)
"""A group's multipliers to choose from, counted from where the largest level reaches as far as its largest number."""

STATES = 4  # 2y + x


def pack_best_codes(unit: torch.Tensor) -> torch.Tensor:
    """Packed codes (N, L, ⌈d/64⌉ + ⌈d/2⌉) of blocks (N, L, d), floating-point numbers from -1 to 1."""
    N, L, d = unit.shape
    padded = torch.nn.functional.pad(unit, (0, -d % GROUP))
    groups = padded.reshape(-1, GROUP)
    used = (torch.arange(padded.shape[2], device=unit.device) < d).expand_as(padded).reshape(-1, GROUP)
    fitting = (groups.abs().amax(1) * MULTIPLIERS).ceil()
    multipliers = torch.stack([(fitting + more).clamp_(1, MULTIPLIERS) for more in TRIED])
    values = (groups.T[:, None] * (multipliers.reciprocal() * (MULTIPLIERS * LEVELS[-1]))).contiguous()
    bounds, levels, places = _nearest(values)
    cells = torch.bucketize(values, bounds, out_int32=True)
    losses = levels[:, cells].sub_(values).square_().mul_(used.T[:, None])  # (subset, 32, tried, n)
    lost, ends, forgotten = _forward(losses)
    choose = (lost * multipliers.square()).argmin(0), torch.arange(len(groups), device=unit.device)
    bits = _backward(ends[choose], forgotten[:, :, *choose])
    before = torch.nn.functional.pad(bits, (0, 0, 2, 0))
    subsets = before[1:-1] + 2 * (bits ^ before[:-2])
    codes = 2 * places.flatten()[subsets * places.shape[1] + cells[:, *choose]] + bits
    return pack_int4(codes.T.reshape(padded.shape)[..., :d], multipliers[choose].view(N, L, -1))


def _nearest(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bounds (28,) between which each subset has one nearest level; these (4, 29), and their places in the subsets."""
    subsets = torch.tensor(LEVEL_SETS, dtype=like.dtype, device=like.device).T.reshape(-1, STATES).T
    middles = (subsets[:, 1:] + subsets[:, :-1]) / 2
    bounds = middles.flatten().sort().values
    inside = torch.cat([bounds[:1] - 1, (bounds[1:] + bounds[:-1]) / 2, bounds[-1:] + 1])
    places = (inside[:, None] > middles[:, None]).sum(2)
    return bounds, subsets.gather(1, places), places


def _forward(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The least losses (…) of whole paths, of those (subset, 32, …) of their steps; and the way back.

    That is the states (…) where these paths end, and the bit that is forgotten on the best way into each state
    (32, state, …).
    """
    losses = losses.unflatten(0, (2, 2))  # (b xor y, x, …)
    lost = torch.full_like(losses[:, :, 0], torch.inf)  # so far, by state (y, x, …)
    lost[0, 0] = 0
    forgotten = losses.new_empty(GROUP, 2, 2, *losses.shape[3:], dtype=torch.bool)
    for step in range(GROUP):
        loss = losses[:, :, step]
        from_0, from_1 = (
            (lost[0] + loss).transpose(0, 1),
            (lost[1] + loss.flip(0)).transpose(0, 1),
        )  # (x, b, …)
        torch.lt(from_1, from_0, out=forgotten[step])
        lost = torch.minimum(from_0, from_1)
    least, ends = lost.flatten(0, 1).min(dim=0)
    return least, ends, forgotten.flatten(1, 2)


def _backward(states: torch.Tensor, forgotten: torch.Tensor) -> torch.Tensor:
    """The lowest bits (32, n) of the codes on the paths that end in states (n,)."""
    bits = states.new_empty(GROUP, len(states))
    for step in reversed(range(GROUP)):
        bits[step] = states & 1
        states = 2 * forgotten[step].gather(0, states[None])[0] + (states >> 1)
    return bits
