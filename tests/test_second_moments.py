import pytest
import torch
from conftest import make_examples
from torch import nn
from trackstar import SecondMoments
from trackstar.gradients.modules import select_weights
from trackstar.gradients.weights import is_conv1d
from trackstar.optimizer.correction import Correction, fit_rank
from trackstar.storage import fingerprint


def test_estimate_is_the_mean_of_squared_gradients(model):
    examples = make_examples((5, 9, 1, 14))
    second = SecondMoments.estimate(model, examples)
    assert second.source == "estimate:3"
    sums = dict.fromkeys(second.moments, 0.0)
    for example in (examples[0], examples[1], examples[3]):
        model.zero_grad()
        ids = torch.tensor([example["input_ids"]])
        logits = model(input_ids=ids).logits[0]
        nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").backward()
        for name, weight in select_weights(model).items():
            gradient = weight.module.weight.grad.double()
            sums[name] += (gradient.T if is_conv1d(weight.module) else gradient) ** 2
    for name, v in second.moments.items():
        assert (v - sums[name] / 3).norm() < 1e-4 * (sums[name] / 3).norm()
        assert second.eps[name] == pytest.approx(0.01 * v.mean().sqrt().item())
        torch.testing.assert_close(second.correction("exact").scales[name], 1 / (v.sqrt() + second.eps[name]))


def draw_moments(rows, cols, seed=0):
    """Second moments with strong row and column structure and noise beside it, as trained networks have them."""
    generator = torch.Generator().manual_seed(seed)
    u, w = torch.randn(rows, generator=generator).exp(), torch.randn(cols, generator=generator).exp()
    return torch.outer(u, w) * torch.randn(rows, cols, generator=generator).mul(0.7).exp()


def weighted_error(v, scale, u, w):
    return ((v * (scale - u.T @ w) ** 2).sum() / (v * scale**2).sum()).item()


def test_the_fit_is_exact_where_it_can_be():
    u, w = torch.rand(1, 30) + 0.1, torch.rand(1, 40) + 0.1
    scale = u.T @ w
    fitted = fit_rank(scale**-2, scale, 1)
    torch.testing.assert_close(fitted[0].T @ fitted[1], scale, rtol=1e-4, atol=0)


def test_more_rank_fits_better_and_beats_adafactor():
    v = draw_moments(60, 90)
    scale = v.rsqrt()
    row, col = v.mean(1), v.mean(0)
    errors = [weighted_error(v, scale, (row / row.mean()).rsqrt()[None], col.rsqrt()[None])]
    errors += [weighted_error(v, scale, *fit_rank(v, scale, rank)) for rank in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)


def test_zeros_in_v_leave_the_fit_finite():
    v = draw_moments(20, 30)
    v[3] = 0
    v[:, 5] = 0
    for rank in (1, 4):
        assert all(part.isfinite().all() for part in fit_rank(v, 1 / (v.sqrt() + 1e-3), rank))


@pytest.mark.parametrize("kind", ["exact", "rank"])
def test_a_correction_survives_the_disk(llama, kind, tmp_path):
    correction = SecondMoments.estimate(llama, make_examples((9, 9))).correction(kind, rank=2)
    correction.save(tmp_path / "c.safetensors")
    back = Correction.load(tmp_path / "c.safetensors")
    assert fingerprint.of_correction(back) == fingerprint.of_correction(correction)
    assert (back.kind, back.source, back.rank) == (kind, "estimate:2", None if kind == "exact" else 2)
    for name, scale in correction.scales.items():
        assert torch.equal(back.scales[name], scale)
    for name, pair in correction.factors.items():
        assert all(map(torch.equal, back.factors[name], pair))


def test_bad_corrections(llama):
    second = SecondMoments.estimate(llama, make_examples((9, 9)))
    with pytest.raises(ValueError, match='kind must be "exact" or "rank", got \'full\''):
        second.correction("full")
    with pytest.raises(ValueError, match=r"rank must be an int from 1 to 16 \(the smallest module\), got 17"):
        second.correction("rank", rank=17)
    second.moments["model.layers.0.mlp.up_proj"].zero_()
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj' must not be zero throughout"):
        second.correction("exact")
    with pytest.raises(ValueError, match="at least one with a token to predict"):
        SecondMoments.estimate(llama, [{"input_ids": [3]}])
