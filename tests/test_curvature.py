import pytest
import torch
from rich.console import Console
from synthetic import make_store
from trackstar.curvature import SecondMoment, choose_mixing, estimate_curvature
from trackstar.spectrum import print_spectrum, spectrum_of


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


def test_doubts_name_few_rows_and_outliers():
    rows = draw_rows(n=40)
    moment = SecondMoment(3, 8)
    for part in rows.split(7):
        moment.add(part)
    assert moment.doubts() is None
    assert torch.equal(moment.reached, torch.tensor([40, 40, 40]))
    squares = rows.double().square().sum(2)
    torch.testing.assert_close(moment.largest_shares, squares.amax(0) / squares.sum(0), rtol=1e-6, atol=0)

    rows[5:, 1] = 0  # five rows reach block 1
    rows[3, 2] *= 1000
    moment = SecondMoment(3, 8)
    moment.add(rows)
    doubts = moment.doubts()
    assert "R_train is of 40 rows: it is rank-deficient in 1 of 3 blocks (as few as 5 rows for 8" in doubts
    assert "one row holds 100% of the trace of block 2, and more than 50% in 1 of 3 blocks" in doubts
    assert "\n" not in doubts


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_spectrum_is_of_r_without_its_damping(tmp_path, dtype, monkeypatch):
    """Of float rows and of rotated codes, a few at a time."""
    monkeypatch.setattr("trackstar.spectrum.PIECE", 4 * 3 * 16 * 10)
    rows = draw_rows(n=100, size=16)
    rows[:, 1, 5:] = 0  # rank 5
    rows[17, 2] *= 30
    spectrum = spectrum_of(make_store(tmp_path / "s", [rows], dtype=dtype))
    moment = torch.einsum("nbi,nbj->bij", rows.double(), rows.double()) / 100
    values = torch.linalg.eigvalsh(moment)
    assert spectrum.rank.tolist() == [16, 5, 16]
    wanted = moment.square().sum((1, 2)) / values[:, -1].square()
    torch.testing.assert_close(spectrum.stable_rank, wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(spectrum.trace, values.sum(1), rtol=1e-4, atol=0)
    delta = 0.1 * values.sum(1) / 16
    damped = (values[:, -1] + delta) / (values[:, 0].clamp_min(0) + delta)
    torch.testing.assert_close(spectrum.condition, damped, rtol=1e-4, atol=0)
    squares = rows.double().square().sum(2)
    tolerance = 1e-4 if dtype == "float32" else 0.02
    torch.testing.assert_close(
        spectrum.largest_share, squares.amax(0) / squares.sum(0), rtol=tolerance, atol=0
    )
    screen = Console(record=True, width=120, force_terminal=False)
    print_spectrum(spectrum, screen)
    text = screen.export_text()
    assert "R_train, 3 blocks of 16" in text
    assert "5 (block 1)" in text
    assert f"{spectrum.largest_share[2]:.1%} (block 2)" in text
