"""What is planned is what happens."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, files_below, make_examples, make_llama
from test_lean import make_odd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from trackstar import SketchSpec, build_store
from trackstar.gradients.examples import encode_examples
from trackstar.gradients.lean import LeanPass
from trackstar.gradients.modules import select_weights
from trackstar.gradients.tap import GradientTap
from trackstar.optimizer.second_moments import SecondMoments
from trackstar.planning.dry_run import MemoryMeter, dry_run
from trackstar.planning.needs import Corpus, Question
from trackstar.planning.plan import amount, describe, duration, planned_job
from trackstar.planning.rates import GPUS, measured_rates

OPTIONS = {"dtype": "float16", "wide": None, "correction": "none", "rank": 1, "sample": 10_000}
QUESTION = Question(100, 32, 10, 256_000_000)
MAKERS = FAMILIES | {name: lambda name=name: make_odd(name)[0] for name in ("Bloom", "Mistral", "Phi", "OPT")}


def of_shapes(make):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make().eval()


def job_for(corpus, spec=None, **changes):
    spec = SketchSpec() if spec is None else spec
    return planned_job(of_shapes(make_llama), spec, corpus, rates=GPUS["H100"], **OPTIONS | changes)


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_pass_on_shapes_costs_what_one_on_numbers_costs(name):
    examples = encode_examples(make_examples((12,) * 16), None)
    model = MAKERS[name]().eval()
    weights = select_weights(model)
    lean = LeanPass(model, [weight.module for weight in weights.values()])
    counter = FlopCounterMode(display=False)
    batch = lean.arrange(examples)
    with lean, counter, MemoryMeter() as memory, GradientTap(weights, lambda use: None):
        lean.run(batch)
    shapes = of_shapes(MAKERS[name])
    cost = dry_run(shapes, select_weights(shapes), examples)
    assert cost.bytes == memory.peak > 0
    # The counter that knows nothing of attention counts the products of weights.
    assert cost.flops >= counter.get_total_flops() > 0


def test_a_model_that_looks_at_its_numbers_cannot_be_planned_for(monkeypatch):
    model = of_shapes(make_llama)
    forward = type(model.model.norm).forward
    monkeypatch.setattr(
        type(model.model.norm), "forward", lambda self, x: forward(self, x) if x.sum() > 0 else x
    )
    with pytest.raises(ValueError, match=r"model must run on shapes alone .*; LlamaForCausalLM does not: "):
        dry_run(model, select_weights(model), encode_examples(make_examples((5,)), None))


def peaks_and_plan(path):
    """Peaks of a build and of a query, each in a process of its own, and what was planned for them."""
    command = [sys.executable, Path(__file__).with_name("plan_memory.py"), path]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [list(map(int, line.split())) for line in output.splitlines()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_within_a_twentieth(tmp_path):
    """Of a build and of a query; if not, of the middle one of three, as the heap varies."""
    measured, planned = peaks_and_plan(tmp_path / "a")
    if planned != pytest.approx(measured, rel=0.05):
        peaks = [measured, *(peaks_and_plan(tmp_path / run)[0] for run in "bc")]
        measured = [sorted(of)[1] for of in zip(*peaks, strict=True)]
    assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("dtype", "wide", "kind"),
    [
        ("float32", None, "exact"),
        ("float16", None, "none"),
        ("int8", None, "rank"),
        ("int4", "float16", "none"),
        ("sign", None, "none"),
    ],
)
def test_disk_is_within_a_twentieth(tmp_path, unsynced, dtype, wide, kind):
    model = make_llama()
    examples = make_examples((torch.arange(600) % 20 + 4).tolist())
    correction = (
        None if kind == "none" else SecondMoments.estimate(model, examples[:4]).correction(kind, rank=2)
    )
    spec = SketchSpec(sketch=4)
    build_store(tmp_path, model, examples, spec=spec, correction=correction, dtype=dtype, wide=wide)
    taken = sum(map(len, files_below(tmp_path).values()))
    encoded = encode_examples(examples, None)
    job = job_for(Corpus.of(encoded), spec, dtype=dtype, wide=wide, correction=kind, rank=2)
    assert job.store_bytes == pytest.approx(taken, rel=0.05)


def test_assumed_texts_are_those_of_a_corpus_of_such_texts():
    text = "the capital of the country is a city on the river " * 10
    examples = [{"text": text[:440], "input_ids": [1] * 100} for _ in range(500)]
    known, assumed = Corpus.of(encode_examples(examples, None)), Corpus.assumed(500, 100)
    assert assumed.disk == pytest.approx(known.disk, rel=0.01)
    assert dataclasses.replace(assumed, strings=known.strings) == known


@pytest.mark.parametrize("rates", ["H100", "L4", None])
def test_larger_corpora_need_more(rates, tmp_path):
    rates = measured_rates(tmp_path) if rates is None else GPUS[rates]
    assert files_below(tmp_path) == {}
    job = job_for(Corpus.assumed(1000, 256))
    needs = []
    for power in range(3, 10):
        larger = dataclasses.replace(job, corpus=Corpus.assumed(10**power, 256))
        assert all(describe(larger, QUESTION, rates))
        needs.append((larger.store_bytes, larger.build_memory, larger.build_seconds(rates)))
    assert all(
        a < b for smaller, larger in itertools.pairwise(needs) for a, b in zip(smaller, larger, strict=True)
    )
    # A query's memory is bounded by its setting, whatever the store.
    assert dataclasses.replace(job, corpus=Corpus.assumed(10**9, 256)).query_memory(
        QUESTION
    ) == job.query_memory(QUESTION)


def test_rates_say_where_they_come_from(tmp_path):
    assert "measured" in str(measured_rates(tmp_path))
    assert "not measured" not in str(measured_rates(tmp_path))
    for rates in GPUS.values():
        assert "from data sheet, not measured" in str(rates)


@pytest.mark.parametrize(
    ("count", "written"),
    [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (1.5e9, "1.5 GB"), (8.7e16, "87 PB")],
)
def test_amounts(count, written):
    assert amount(count) == written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0, "0 s"), (90, "90 s"), (600, "10 min"), (20_000, "6 h"), (1e6, "12 days"), (1e9, "31.7 years")],
)
def test_durations(seconds, written):
    assert duration(seconds) == written
