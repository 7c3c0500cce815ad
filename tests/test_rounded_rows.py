"""Many queries and rows of floats: rows are rounded to bytes first, and the answer is as if they were not."""

import pytest
import torch

from trackstar_kernels import _C, mixed_topk, score_topk
from trackstar_kernels.scoring import merge_topk, prepare_task

Q, FEW, N, K = 37, 13, 1200, 6
"""Queries; so few that rows are not rounded for them; rows; results. The first 512 rows are never rounded."""

ENOUGH = 2100
"""Rows of a single call that are worth rounding."""

SHAPES = [(1, 512), (3, 256), (5, 70), (1, 33)]
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True, params=_C.available_isas())
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def random(n, L, d, seed):
    return torch.randn(n, L, d, generator=torch.Generator().manual_seed(seed))


def plain(L, d):
    return random(N, L, d, 1)


def alike(L, d):
    """Rows that bounds cannot tell apart, and many that are the same."""
    rows = random(1, L, d, 1) + 1e-4 * random(N, L, d, 2)
    rows[N // 2 :] = rows[: N // 2].roll(13, 0)
    return rows


def uneven(L, d):
    """One number that outweighs its run, zeros, and sizes that no byte can stand for."""
    rows = random(N, L, d, 1)
    rows[::3, :, 0] *= 1000
    rows[5::50] = 0
    rows[7::50] *= 1e-6
    rows[9::50] *= 1e-20
    return rows


def broken(L, d):
    """NaN, infinity, and what overflows."""
    rows = random(N, L, d, 1)
    rows[3, 0, 1], rows[100, -1, 2], rows[101, 0, 0] = float("nan"), float("inf"), -float("inf")
    rows[200] *= 1e18
    return rows


ROWS = [plain, alike, uneven, broken]


def in_pieces(task, rows, norms, size, largest):
    """What a scan finds that goes piece by piece and looks for nothing that is worse than what it has."""
    best, reached = None, None
    for start in range(0, len(rows), size):
        piece = slice(start, start + size)
        found = task.topk(rows[piece], norms[piece], K, largest=largest, start=start, reached=reached)
        best = merge_topk([found] if best is None else [best, found], K, largest)
        reached = best[0][:, -1].contiguous()
    return best


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("made", ROWS)
@pytest.mark.parametrize("largest", [True, False])
def test_the_answer_is_that_of_the_rows(made, shape, dtype, largest):
    """To the bit: the same queries, so few at a time that nothing is rounded for them, say what it is."""
    queries, rows = random(Q, *shape, 0), made(*shape).to(dtype)
    norms = rows.float().square().sum(2)
    parts = [mixed_topk(part, rows, norms, K, 0.0, largest=largest) for part in queries.split(FEW)]
    wanted = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    task = prepare_task(queries, 0.0)
    for found in (
        task.topk(rows, norms, K, largest=largest),
        in_pieces(task, rows, norms, 100, largest),
        in_pieces(task, rows, norms, 100, largest),
    ):
        assert torch.equal(found[1], wanted[1])
        assert torch.equal(found[0].nan_to_num(2), wanted[0].nan_to_num(2))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 256), (2, 300), (5, 70)], ids=str)
@pytest.mark.parametrize("largest", [True, False])
def test_a_single_call_rounds_too(shape, dtype, scaled, largest):
    """To the bit, on a row for one query alone too; scales may be negative, tiny, zero and no numbers at all."""
    queries, rows = random(Q, *shape, 0), random(ENOUGH, *shape, 1)
    rows[1500] = 3 * queries[17]
    rows = rows.to(dtype)
    scales = None
    if scaled:
        scales = random(ENOUGH, shape[0], 1, 2)[:, :, 0]
        scales[::3] *= 1e-7
        scales[::7, 0], scales[600, 0], scales[601, 1] = 0, float("inf"), float("nan")
    parts = [score_topk(part, rows, K, scales=scales, largest=largest) for part in queries.split(FEW)]
    wanted = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    found = score_topk(queries, rows, K, scales=scales, largest=largest)
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[0].nan_to_num(2), wanted[0].nan_to_num(2))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_what_is_not_looked_for_is_left_out(mixing, largest):
    """Of equal scores none is."""
    queries, rows = random(Q, 3, 256, 0), plain(3, 256)
    norms = rows.square().sum(2)
    scores, indices = mixed_topk(queries, rows, norms, K, mixing, largest=largest)
    task = prepare_task(queries, mixing)
    again = task.topk(rows, norms, K, largest=largest, reached=scores[:, 2].contiguous())
    assert torch.equal(again[1][:, :3], indices[:, :3]) and torch.equal(again[0][:, :3], scores[:, :3])
    beyond = 2.0 if largest else -2.0
    nothing, _ = task.topk(rows, norms, K, largest=largest, reached=torch.full((Q,), beyond))
    assert nothing.isnan().all()


@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_what_was_reached_may_lie_anywhere_but_is_float32(mixing):
    queries, rows = random(Q, 2, 256, 0), random(N, 2, 256, 1)
    norms = rows.square().sum(2)
    task = prepare_task(queries, mixing)
    apart = torch.stack([task.topk(rows, norms, K)[0][:, -1], torch.full((Q,), torch.inf)], dim=1)[:, 0]
    assert not apart.is_contiguous()
    found, wanted = (task.topk(rows, norms, K, reached=one) for one in (apart, apart.contiguous()))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    with pytest.raises(TypeError, match=r"reached"):
        task.topk(rows, norms, K, reached=apart.double())
    with pytest.raises(ValueError, match=r"reached"):
        task.topk(rows, norms, K, reached=apart[1:])
