"""Factors on disk: fits that are killed and go on, folders that are damaged or of something else."""

import errno
import json
import math
import os
import shutil
import signal
from functools import partial

import pytest
import torch
from conftest import SIZES, files_below, make_examples, make_llama
from killable import FORKS, finish
from torch import nn
from trackstar import StoreError
from trackstar.ekfac import factors as factors_module
from trackstar.ekfac import fit_factors, fitting, influence, open_factors
from transformers.modeling_outputs import CausalLMOutput

pytestmark = pytest.mark.usefixtures("unsynced")

LENGTHS = (5, 9, 17, 3, 30, 2, 12, 1, 0)
PATTERNS = ["*.0.self_attn.q_proj", "*.0.mlp.down_proj"]


def tiny_fit(path, **changes):
    torch.manual_seed(0)
    model = make_llama(num_hidden_layers=1).eval()
    options = {"examples": make_examples(LENGTHS), "modules": PATTERNS} | changes
    return fit_factors(path, model, **options)


def fit_to_death(path, step=None):
    """Fit in chunks of two examples, with sums kept after each, killed before the ``step``-th file or folder gets its
    final name (never, if None)."""
    rename, replace = os.rename, os.replace
    left = step

    def or_die(act, *arguments):
        nonlocal left
        if left is not None:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return act(*arguments)

    os.fsync, os.rename, os.replace = lambda handle: None, partial(or_die, rename), partial(or_die, replace)
    fitting.WINDOW, fitting.SAVE_EVERY, fitting.SAVE_SHARE = 2, 0.0, math.inf
    tiny_fit(path)


def run(*arguments):
    """Exit code of a fit in a child."""
    process = FORKS.Process(target=fit_to_death, args=arguments)
    process.start()
    return finish(process)


def test_killed_before_every_commit(tmp_path):
    """The next fit ends with the bytes of one without trouble, and what is half done is never opened."""
    assert run(tmp_path / "whole") == 0
    files = files_below(tmp_path / "whole")
    steps = 0
    while True:
        path = tmp_path / str(steps)
        code = run(path, steps)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if not (path / "factors.json").exists():
            assert steps == 0
        elif json.loads(json.loads((path / "factors.json").read_text())["content"])["eigenvalues"] is None:
            with pytest.raises(StoreError, match="not complete: run their fit again"):
                open_factors(path)
        assert run(path) == 0
        assert files_below(path) == files
        steps += 1
    # The record; four sums a pass but the last one's, two bases and Λ: each a folder and a commit.
    assert steps == 1 + 2 * (4 + 2 + 3 + 1)


def test_a_fit_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A chunk whose sums are kept is not run again."""
    monkeypatch.setattr(fitting, "WINDOW", 2)
    monkeypatch.setattr(fitting, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(fitting, "SAVE_SHARE", math.inf)
    whole = files_below(tiny_fit(tmp_path / "whole").path)
    chunks = []

    class Capture(fitting.TokenCapture):
        def run(self, examples, add, **options):
            if options:
                chunks.append([len(example) for example in examples])
                if len(chunks) in (3, 6):
                    raise KeyboardInterrupt
            yield from super().run(examples, add, **options)

    monkeypatch.setattr(fitting, "TokenCapture", Capture)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tiny_fit(tmp_path / "factors")
    factors = tiny_fit(tmp_path / "factors")
    # Only what was interrupted is run twice.
    first = [[5, 9], [17, 3], [30, 2], [12]]
    assert chunks == [*first[:3], *first[2:], *first[:1], *first]
    assert files_below(factors.path) == whole


@pytest.fixture
def factors(tmp_path):
    return tiny_fit(tmp_path / "factors")


def test_a_second_fit_changes_nothing(factors, monkeypatch):
    before = files_below(factors.path)
    monkeypatch.setattr(fitting.TokenCapture, "run", None)
    assert repr(tiny_fit(factors.path)) == repr(factors)
    assert files_below(factors.path) == before


def test_what_a_folder_is_of_may_not_change(factors):
    for changes, line in (
        (
            {"examples": make_examples(LENGTHS, seed=1)},
            r"examples\.fingerprint = .*: fit into another folder",
        ),
        ({"seed": 1}, "seed = 0, this fit has 1"),
        ({"sample": 3}, "sample = 7, this fit has 3"),
        ({"biases": True}, "biases = False, this fit has True"),
        ({"modules": PATTERNS[:1]}, r"modules.*down_proj = \[32, 44\], this fit has None"),
        ({"resume": False}, "must not hold factors when resume=False"),
    ):
        with pytest.raises(StoreError, match=line):
            tiny_fit(factors.path, **changes)


def test_paths_that_hold_something_else(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="path must be a folder, got the file"):
        tiny_fit(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "novel.txt").touch()
    with pytest.raises(StoreError, match=r"holds 'novel.txt' and no factors.json"):
        tiny_fit(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="there are no factors at"):
        open_factors(tmp_path / "folder")


def test_another_process_is_at_it(factors):
    with (
        fitting.locked(factors.path, "factors"),
        pytest.raises(StoreError, match=f"another process is writing to the factors at {factors.path}"),
    ):
        tiny_fit(factors.path)


@pytest.mark.parametrize("name", ["bases/000000", "bases/000001", "eigenvalues"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_damage_is_named_and_never_served(factors, name, how):
    file = factors.path / name / factors_module.TENSORS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content if how == "flipped" else content[:-1])
    reopened = open_factors(factors.path)
    with pytest.raises(StoreError, match=f"{name}/{factors_module.TENSORS} .*nothing is served"):
        for module in reopened.shapes:
            reopened.basis(module)
            reopened.eigenvalues(module)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format":1,"xxh3":"0","content":"{}"}'])
def test_a_damaged_record_is_named(factors, content):
    (factors.path / "factors.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"factors\.json is damaged"):
        open_factors(factors.path)


def test_a_record_of_another_format(factors):
    (factors.path / "factors.json").write_bytes(b'{"format":99}')
    with pytest.raises(StoreError, match="format 99; this version reads format 1"):
        open_factors(factors.path)


def test_damaged_sums_stop_a_fit(tmp_path):
    path = tmp_path / "factors"
    # The record, a folder and its commit: the first sums are kept, and the next ones never get their name.
    assert run(path, 3) == -signal.SIGKILL
    (file,) = path.glob(f"sums/*[0-9]/{factors_module.TENSORS}")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match=r"sums/covariances-.* does not match its checksum"):
        tiny_fit(path)


def test_a_full_disk_is_told_before_the_fit(tmp_path, monkeypatch, capsys):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"the fit needs 0\.\d MB of disk, 0.0 MB are free") as raised:
        tiny_fit(tmp_path / "factors")
    assert raised.value.errno == errno.ENOSPC
    said = " ".join(capsys.readouterr().err.split())
    assert "factors of 2 matrices from 7 examples: " in said
    assert "of memory at most" in said


def test_a_plan_tells_the_disk_that_factors_take(factors, capsys):
    shutil.rmtree(factors.path)
    tiny_fit(factors.path)
    tensors = sum((o * o + i * i + o * i) * 4 for o, i in factors.shapes.values())
    files = sum(len(content) for content in files_below(factors.path).values())
    assert tensors < files < tensors + 8000
    assert f"{tensors / 1000:.1f} kB on disk" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed must be an int from 0"),
        ({"seed": True}, "seed must be an int from 0"),
        ({"sample": 0}, "sample must be an int from 1"),
        ({"modules": ["nothing"]}, "pattern 'nothing' must match"),
    ],
)
def test_bad_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_fit(tmp_path / "factors", **changes)


def test_examples_without_a_loss(tmp_path, llama):
    with pytest.raises(ValueError, match="at least one with a token to predict"):
        fit_factors(tmp_path / "factors", llama, make_examples((1, 0)))


class Repeating(nn.Module):
    """A model of nothing this library knows, whose one layer runs ``times`` times."""

    def __init__(self, times, factor=1.0):
        super().__init__()
        self.times, self.factor = times, factor
        self.config = object()
        self.embed, self.layer = nn.Embedding(SIZES["vocab_size"], 8), nn.Linear(8, 8)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for _ in range(self.times):
            x = self.layer(x)
        return CausalLMOutput(logits=self.factor * (x @ self.embed.weight.T))


def test_a_module_that_runs_twice(tmp_path):
    with pytest.raises(RuntimeError, match="module 'layer' ran 2 times in a pass, where EK-FAC needs once"):
        fit_factors(tmp_path / "factors", Repeating(2), make_examples((5,)))


def test_a_module_that_never_receives_a_gradient(tmp_path):
    with pytest.raises(ValueError, match="modules must receive a gradient; 'layer' receives none from any"):
        fit_factors(tmp_path / "factors", Repeating(1, factor=0.0), make_examples((5,)))


def test_a_gradient_that_is_not_finite_names_its_example(tmp_path, llama, monkeypatch):
    given = make_examples((5, 7, 5))
    given[1] |= {"id": "bad", "input_ids": [96] * 7}
    embed = llama.model.embed_tokens.forward
    monkeypatch.setattr(
        llama.model.embed_tokens,
        "forward",
        lambda ids: embed(ids) * torch.where(ids == 96, torch.inf, 1.0)[..., None],
    )
    with pytest.raises(FloatingPointError, match=r"of example 'bad' at 'model\.layers"):
        fit_factors(tmp_path / "factors", llama, given)


def test_factors_of_another_model_are_refused(factors, llama):
    queries = [{"input_ids": [1, 2], "labels": [-100, 2]}]
    with pytest.raises(StoreError, match=f"model must be the one that {factors.path} was built with"):
        influence(factors, llama, make_examples(LENGTHS), queries, k=1)
