"""The sweeps' rows: many sketches from one pass, and small sketches as corners of large ones."""

import numpy as np
import pytest
import torch
import trackstar
from conftest import VOCABULARY, make_llama
from trackstar.curvature import choose_mixing
from trackstar.gradients.collector import GradientCollector
from trackstar.gradients.examples import encode_examples
from trackstar.gradients.lean import LeanPass

from experiments.__main__ import PARTS
from experiments.scores import automatic_mixing
from experiments.sketches import _mapped, _write
from experiments.study import SIZES
from experiments.sweeps import SWEEPS

LENGTHS = (7, 3, 12, 5, 9)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_llama().eval()


@pytest.fixture(scope="module")
def examples():
    generator = np.random.default_rng(0)
    return [{"input_ids": generator.integers(VOCABULARY, size=length).tolist()} for length in LENGTHS]


@pytest.fixture(scope="module")
def exact(model, examples):
    return trackstar.SecondMoments.estimate(model, examples).correction("exact")


def rows_of(model, examples, spec, correction=None):
    return torch.cat(list(trackstar.collect_rows(model, examples, spec=spec, correction=correction)))


def test_rows_of_many_sketches_are_those_of_each(model, examples, exact, tmp_path):
    settings = [
        (trackstar.SketchSpec(sketch=4), exact),
        (trackstar.SketchSpec(sketch=4), None),
        (trackstar.SketchSpec(sketch=6, blocks=4, kind="countsketch", seed=1), exact),
    ]
    collectors = [GradientCollector(model, *setting) for setting in settings]
    files = [tmp_path / f"{number}.npy" for number in range(len(settings))]
    lean = LeanPass(model, collectors[0].modules.values())
    _write(lean, encode_examples(examples, None), collectors, files)
    for file, setting in zip(files, settings, strict=True):
        torch.testing.assert_close(_mapped(file), rows_of(model, examples, *setting), rtol=1e-5, atol=1e-6)
    assert sorted(tmp_path.iterdir()) == files


def test_corner_of_a_larger_sketch_is_a_smaller_sketch(model, examples, exact):
    large, small = (rows_of(model, examples, trackstar.SketchSpec(sketch=p), exact) for p in (8, 4))
    corner = large.unflatten(2, (8, 8))[:, :, :4, :4].flatten(2) * 2
    torch.testing.assert_close(corner, small, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [5, 40])
def test_mixing_is_that_of_whole_curvatures(count):
    passages, questions = torch.randn(count, 2, 16), torch.randn(4, 2, 16)
    train = torch.einsum("nla,nlb->lab", passages.double(), passages.double()) / count
    train += 0.1 * torch.einsum("laa->l", train)[:, None, None] / 16 * torch.eye(16)
    wanted = choose_mixing(questions, torch.linalg.eigvalsh(train))
    assert automatic_mixing(passages, questions) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", SIZES)
def test_what_a_size_leaves_out_can_be_named(name):
    assert set(SIZES[name].left_out) <= {*PARTS, *SWEEPS} - {"provenance", "ladder", "sweeps", "report"}
