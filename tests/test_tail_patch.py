"""Tail-patch: the step is torch's own, the weights come back, and the averages are those of their definition."""

import copy
import json
import math

import pytest
import torch
from conftest import make_examples, make_llama
from trackstar import TailPatch, tail_patch
from trackstar.cli import app
from trackstar.evaluation.adam_step import AdamStep
from typer.testing import CliRunner


def trained(optimizer=torch.optim.AdamW, steps=3, **options):
    """A model after some steps on random tokens, and its optimizer; matrices and vectors in groups of their own."""
    torch.manual_seed(0)
    model = make_llama()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    chosen = optimizer(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, **options)
    for example in make_examples([9] * steps, seed=1):
        chosen.zero_grad()
        ids = torch.tensor([example["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        chosen.step()
    chosen.zero_grad()
    return model, chosen


def loss_of(model, example, reduction="mean"):
    ids, labels = (
        torch.tensor([example["input_ids"]]),
        torch.tensor([example.get("labels", example["input_ids"])]),
    )
    logits = model(input_ids=ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction=reduction)


def make_queries(lengths):
    """The last two tokens are the target."""
    return [
        example | {"labels": [-100] * (len(example["input_ids"]) - 2) + example["input_ids"][-2:]}
        for example in make_examples(lengths, seed=2)
    ]


PASSAGES = make_examples([7, 11, 5], seed=3)
QUERIES = make_queries([6, 9])
PROPONENTS = [[PASSAGES[0], PASSAGES[1]], [PASSAGES[1], PASSAGES[2]]]


def expected(model, optimizer, reduction="mean", lr=None, momentum=True, clip=None):
    """log p of both queries after torch's own step on each proponent, each from a copy."""
    after = torch.empty(2, 2, dtype=torch.float64)
    for q, passages in enumerate(PROPONENTS):
        for k, passage in enumerate(passages):
            fresh, stepper = copied(model, optimizer)
            for group in stepper.param_groups:
                group["lr"] = group["lr"] if lr is None else lr
                group["betas"] = (group["betas"][0] if momentum else 0.0, group["betas"][1])
            loss_of(fresh, passage, reduction).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(fresh.parameters(), clip)
            stepper.step()
            with torch.no_grad():
                after[q, k] = -loss_of(fresh, QUERIES[q], "sum").double()
    return after


def copied(model, optimizer):
    fresh = copy.deepcopy(model)
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = dict(fresh.named_parameters())
    groups = [
        {"params": [parameters[names[id(p)]] for p in group["params"]]} for group in optimizer.param_groups
    ]
    stepper = type(optimizer)(groups)
    stepper.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which shares its tensors
    return fresh, stepper


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam])
def test_step_is_torchs_own(optimizer):
    model, saved = trained(optimizer)
    fresh, stepper = copied(model, saved)
    for network in (model, fresh):
        loss_of(network, PASSAGES[0]).backward()
    AdamStep(model, saved.state_dict()).take()
    stepper.step()
    for (name, got), wanted in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-9), name


def test_parameter_is_stepped_piece_by_piece(monkeypatch):
    model, saved = trained()
    fresh, stepper = copied(model, saved)
    for network in (model, fresh):
        loss_of(network, PASSAGES[0]).backward()
    monkeypatch.setattr("trackstar.evaluation.adam_step.PIECE", 100)
    AdamStep(model, saved.state_dict()).take()
    stepper.step()
    for (name, got), wanted in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-9), name


def test_step_leaves_the_saved_moments_alone():
    model, saved = trained()
    kept = copy.deepcopy(saved.state_dict())
    loss_of(model, PASSAGES[0]).backward()
    AdamStep(model, saved.state_dict()).take()
    for key, entry in saved.state_dict()["state"].items():
        for field, value in entry.items():
            assert torch.equal(value, kept["state"][key][field])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"lr": 0.05},
        {"momentum": False},
        {"clip": 0.1},
        {"reduction": "sum", "clip": 1e6},
    ],
)
def test_targets_after_a_step_are_as_after_torchs(options):
    model, optimizer = trained()
    got = tail_patch(model, optimizer.state_dict(), QUERIES, PROPONENTS, **options)
    assert torch.allclose(got.after, expected(model, optimizer, **options), atol=1e-5)
    with torch.no_grad():
        before = torch.stack([-loss_of(model, query, "sum") for query in QUERIES]).double()
    assert torch.allclose(got.before, before, atol=1e-5)
    assert torch.allclose(got.gains, got.after.exp() - before.exp()[:, None], atol=1e-7)


def test_idle_step_is_momentum_and_decay_alone():
    model, optimizer = trained()
    got = tail_patch(model, optimizer.state_dict(), QUERIES, PROPONENTS)
    fresh, stepper = copied(model, optimizer)
    for parameter in fresh.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepper.step()
    with torch.no_grad():
        wanted = torch.stack([-loss_of(fresh, query, "sum") for query in QUERIES]).double()
    assert torch.allclose(got.idle, wanted, atol=1e-5)


def test_without_momentum_a_step_without_gradient_is_weight_decay_alone():
    model, optimizer = trained()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    got = tail_patch(model, optimizer.state_dict(), QUERIES, PROPONENTS, momentum=False)
    assert torch.equal(got.idle, got.before)


def test_weights_gradients_and_mode_come_back_bit_for_bit():
    model, optimizer = trained()
    model.train()
    loss_of(model, PASSAGES[2]).backward()
    kept = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    tail_patch(model, optimizer.state_dict(), QUERIES, PROPONENTS, lr=0.5)
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[name][0])
        assert torch.equal(parameter.grad, kept[name][1])


def test_weights_come_back_after_an_error(monkeypatch):
    model, optimizer = trained()
    kept = [p.detach().clone() for p in model.parameters()]

    def diverge(step):
        for parameter in model.parameters():
            parameter.data.fill_(math.nan)

    monkeypatch.setattr(AdamStep, "take", diverge)
    with pytest.raises(FloatingPointError, match="is lr too large"):
        tail_patch(model, optimizer.state_dict(), QUERIES, PROPONENTS)
    assert all(torch.equal(p, saved) for p, saved in zip(model.parameters(), kept, strict=True))


def test_shared_passage_is_stepped_on_once(tmp_path):
    model, optimizer = trained()
    keep = tmp_path / "steps.jsonl"
    tail_patch(model, optimizer.state_dict(), QUERIES, PROPONENTS, keep=keep)
    steps = [json.loads(line) for line in keep.read_text().splitlines()[1:]]
    # The idle step and three passages, of which one belongs to both queries.
    assert [len(step["log_p"]) for step in steps] == [2, 1, 2, 1]


def test_stopped_run_goes_on(tmp_path, monkeypatch):
    model, optimizer = trained()
    keep = tmp_path / "steps.jsonl"
    whole = tail_patch(model, optimizer.state_dict(), QUERIES, PROPONENTS, keep=keep)
    lines = keep.read_text().splitlines(keepends=True)
    keep.write_text("".join(lines[:3]) + lines[3][:20])
    taken = []
    step = AdamStep.take
    monkeypatch.setattr(AdamStep, "take", lambda self: (taken.append(1), step(self)))
    again = tail_patch(model, optimizer.state_dict(), QUERIES, PROPONENTS, keep=keep)
    assert len(taken) == 2
    assert torch.equal(again.after, whole.after)
    assert torch.equal(again.idle, whole.idle)
    assert keep.read_text() == "".join(lines)


def test_kept_steps_of_another_rate_are_refused(tmp_path):
    model, optimizer = trained()
    keep = tmp_path / "steps.jsonl"
    tail_patch(model, optimizer.state_dict(), QUERIES, PROPONENTS, keep=keep)
    with pytest.raises(ValueError, match="keep must be of the same step,"):
        tail_patch(model, optimizer.state_dict(), QUERIES, PROPONENTS, keep=keep, lr=0.5)
    with pytest.raises(ValueError, match="keep must be of the same step,"):
        tail_patch(model, optimizer.state_dict(), QUERIES, PROPONENTS, keep=keep, momentum=False)


@pytest.mark.slow
def test_processes_agree():
    model, optimizer = trained()
    alone = tail_patch(model, optimizer.state_dict(), QUERIES, PROPONENTS)
    together = tail_patch(model, optimizer.state_dict(), QUERIES, PROPONENTS, processes=2)
    assert torch.equal(alone.after, together.after)


def test_gain_is_the_mean_over_the_first_k_that_there_are():
    before = torch.tensor([math.log(0.1), math.log(0.5)], dtype=torch.float64)
    after = torch.tensor([[0.2, 0.4, math.nan], [0.4, 0.6, 0.8]], dtype=torch.float64).log()
    patch = TailPatch(before, before, after)
    assert torch.allclose(patch.gain(1), torch.tensor([0.1, -0.1], dtype=torch.float64))
    assert torch.allclose(patch.gain(3), torch.tensor([0.2, 0.1], dtype=torch.float64))
    with pytest.raises(ValueError, match="k must be an int from 1 to 3, got 4"):
        patch.gain(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proponents": PROPONENTS[:1]}, r"proponents must be one list for each of the 2 queries, got 1"),
        ({"reduction": "max"}, r"reduction must be one of mean, sum; got 'max'"),
        ({"processes": 0}, r"processes must be an int of at least 1, got 0"),
        ({"clip": -1.0}, r"clip must be None or above zero, got -1\.0"),
        ({"lr": 0.0}, r"lr must be above zero, got 0\.0"),
        (
            {"optimizer_state": {"state": {}, "param_groups": []}},
            r"optimizer_state|state must be of this model's",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    model, optimizer = trained()
    given = {
        "optimizer_state": optimizer.state_dict(),
        "queries": QUERIES,
        "proponents": PROPONENTS,
    } | change
    with pytest.raises(ValueError, match=message):
        tail_patch(model, **given)


def test_other_optimizers_are_named():
    model, optimizer = trained()
    state = optimizer.state_dict()
    for entry in state["state"].values():
        del entry["exp_avg"]
    with pytest.raises(ValueError, match="optimizer_state must be Adam's, with exp_avg and exp_avg_sq"):
        tail_patch(model, state, QUERIES, PROPONENTS)


def test_narrow_weights_are_refused():
    model, optimizer = trained()
    with pytest.raises(ValueError, match=r"must have float32 weights, .* is torch\.bfloat16"):
        tail_patch(model.bfloat16(), optimizer.state_dict(), QUERIES, PROPONENTS)


def test_command_says_the_mean_gains(tmp_path):
    from test_cli import save_tokenizer

    model, optimizer = trained()
    words = [f"w{i}" for i in range(96)]
    save_tokenizer(tmp_path / "model", words)
    model.save_pretrained(tmp_path / "model")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    # The word w<i> is token i + 1.
    passages = ["w3 w4 w5 w6", "w9 w8 w7"]
    line = {"inputs_plaintext": "w1 w2", "targets_plaintext": "w3", "proponents": passages}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line) + "\n")
    given = ["--model", "model", "--optimizer", "optimizer.pt", "--results", "answers.jsonl", "--lr", "0.05"]
    arguments = [
        value if value.startswith("--") or value == "0.05" else str(tmp_path / value) for value in given
    ]
    result = CliRunner().invoke(app, ["tail-patch", *arguments])
    assert result.exit_code == 0, result.output
    wanted = tail_patch(
        model,
        optimizer.state_dict(),
        [{"input_ids": [2, 3, 4], "labels": [-100, -100, 4]}],
        [[{"input_ids": [4, 5, 6, 7]}, {"input_ids": [10, 9, 8]}]],
        lr=0.05,
    )
    for k in (1, 2):
        assert f"over the first  {k}: {100 * wanted.gain(k).mean():+.4f}" in result.output
