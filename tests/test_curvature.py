import pytest
import torch
from trackstar.curvature import choose_mixing, estimate_curvature


def draw_rows(n=200, blocks=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(blocks, size, generator=generator) * 10
    return torch.randn(n, blocks, size, generator=generator) * spread


def test_r_train_is_the_damped_mean_over_any_chunks():
    rows = draw_rows()
    curvature = estimate_curvature(rows.split([1, 60, 139]), 3, 8)
    wide = rows.double()
    for b in range(3):
        mean = wide[:, b].T @ wide[:, b] / len(rows)
        wanted = mean + 0.1 * mean.trace() / 8 * torch.eye(8, dtype=torch.float64)
        torch.testing.assert_close(curvature.train[b], wanted, rtol=1e-6, atol=1e-6)
        assert curvature.damping[b].item() == pytest.approx(0.1 * mean.trace().item() / 8, rel=1e-6)


def test_whitener_is_the_inverse_square_root():
    curvature = estimate_curvature([draw_rows()], 3, 8)
    whitener = curvature.whitener.double()
    identity = whitener @ curvature.train @ whitener
    torch.testing.assert_close(identity, torch.eye(8, dtype=torch.float64).expand(3, 8, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(whitener, whitener.transpose(1, 2), rtol=0, atol=1e-7)


def test_fewer_rows_than_dimensions_still_whiten():
    curvature = estimate_curvature([draw_rows(n=3)], 3, 8)
    assert curvature.whitener.isfinite().all()
    assert (curvature.eigenvalues >= curvature.damping[:, None]).all()


def test_a_block_without_any_gradient_is_named():
    rows = draw_rows()
    rows[:, 1] = 0
    with pytest.raises(ValueError, match="they are in block 1"):
        estimate_curvature([rows], 3, 8)


def dense_mixing(query_rows, eigenvalues, component):
    """The rule from dense singular values of the block-diagonal matrices."""
    blocks = [query_rows[:, b].double() for b in range(query_rows.shape[1])]
    evaluation = (
        torch.cat([torch.linalg.svdvals(x.T @ x / len(x)) for x in blocks]).sort(descending=True).values
    )
    train = eigenvalues.flatten().sort(descending=True).values
    return (train[component] / (evaluation[component] + train[component])).item()


@pytest.mark.parametrize(("queries", "blocks", "size"), [(40, 2, 64), (40, 2, 16), (100, 2, 64)])
def test_mixing_makes_the_spectra_cross_at_the_papers_component(queries, blocks, size):
    eigenvalues = estimate_curvature([draw_rows(300, blocks, size)], blocks, size).eigenvalues
    rows = draw_rows(queries, blocks, size, seed=1)
    component = max(round(1000 / 65536 * blocks * size), 1) - 1
    assert choose_mixing(rows, eigenvalues) == pytest.approx(
        dense_mixing(rows, eigenvalues, component), rel=1e-9
    )


def test_with_few_queries_the_last_nonzero_component_decides():
    size = 256
    eigenvalues = estimate_curvature([draw_rows(300, 1, size)], 1, size).eigenvalues
    rows = draw_rows(2, 1, size, seed=1)
    assert choose_mixing(rows, eigenvalues) == pytest.approx(dense_mixing(rows, eigenvalues, 1), rel=1e-9)


def test_mixing_stays_below_one():
    eigenvalues = torch.ones(1, 4, dtype=torch.float64)
    assert choose_mixing(torch.full((1, 1, 4), 1e-6), eigenvalues) == 0.99
