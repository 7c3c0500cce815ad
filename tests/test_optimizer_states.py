"""Second moments out of every form in which optimizers are saved."""

import json
import socket
import subprocess
import sys
import warnings

import pytest
import sharded_training
import torch
import transformers
from conftest import make_examples, make_gpt2, make_llama
from safetensors.torch import save_file
from torch.distributed import checkpoint
from torch.distributed.checkpoint import _version
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from trackstar import SecondMoments, SketchSpec
from trackstar.gradients.modules import select_weights
from trackstar.gradients.weights import is_conv1d
from trackstar.optimizer.files import QUANTIZED

UP = "model.layers.1.mlp.up_proj"
STEPS = 3
BETAS = (0.9, 0.99)
EPS = 1e-7


def trained(model, optimizer, steps=STEPS):
    ids = torch.tensor([example["input_ids"] for example in make_examples((12, 12, 12, 12))])
    ids %= model.config.vocab_size
    for step in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids.roll(step, 0)[:2], labels=ids.roll(step, 0)[:2]).loss.backward()
        optimizer.step()
    return optimizer


def adam(model):
    return trained(model, torch.optim.AdamW(model.parameters(), lr=1e-3, betas=BETAS, eps=EPS))


def weight(model, module):
    return model.get_submodule(module).weight


def check_adam(second, model, optimizer, source="optimizer:adam", eps=EPS, steps=STEPS):
    """Every module's V is the optimizer's exp_avg_sq / (1 − β₂^step), to the bit."""
    assert second.source == source
    assert list(second.moments) == list(select_weights(model))
    for name, captured in select_weights(model).items():
        v = optimizer.state[captured.module.weight]["exp_avg_sq"] / (1 - BETAS[1] ** steps)
        assert torch.equal(second.moments[name], v.T if is_conv1d(captured.module) else v), name
        assert second.eps[name] == eps


# What is saved, and where: each function writes a state into a folder and gives the path to read.


def save_distributed(folder, state):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer = checkpoint.FileSystemWriter(folder, single_file_per_rank=False, sync_files=False)
        checkpoint.save(state, storage_writer=writer, no_dist=True)


def by_name(model, optimizer, **options):
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))


def flat_tensors(model, optimizer, prefix=""):
    state = by_name(model, optimizer)["state"]
    return {
        f"{prefix}{name}.{field}": tensor for name, entry in state.items() for field, tensor in entry.items()
    }


def a_file(model, optimizer, folder):
    torch.save(optimizer.state_dict(), folder / "anything.pth")
    return folder / "anything.pth"


def a_file_from_before_zip(model, optimizer, folder):
    torch.save(optimizer.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def a_trainer_folder(model, optimizer, folder):
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def a_full_state(model, optimizer, folder):
    torch.save(by_name(model, optimizer), folder / "optimizer.bin")
    return folder


def a_flat_state(model, optimizer, folder):
    torch.save(by_name(model, optimizer, flatten_optimizer_state_dict=True), folder / "optimizer.pt")
    return folder


def a_sharded_state(model, optimizer, folder):
    save_distributed(folder / "optimizer_0", {"optimizer": by_name(model, optimizer)})
    return folder


def a_sharded_flat_state(model, optimizer, folder):
    state = {
        "model": model.state_dict(),
        "optimizer": by_name(model, optimizer, flatten_optimizer_state_dict=True),
    }
    save_distributed(folder, state)
    return folder


def a_sharded_numbered_state(model, optimizer, folder):
    save_distributed(folder, {"train": {"optim": optimizer.state_dict(), "step": 3}})
    return folder / ".metadata"


def a_sharded_state_of_torch_2_3(model, optimizer, folder):
    _version._derived_version = "2_3"
    try:
        save_distributed(folder, {"optimizer": by_name(model, optimizer)})
    finally:
        _version._derived_version = None
    return folder


def options(**more):
    return {name: json.dumps(value) for name, value in ({"betas": BETAS, "eps": EPS} | more).items()}


def a_safetensors_file(model, optimizer, folder):
    save_file(flat_tensors(model, optimizer), folder / "optimizer.safetensors", options())
    return folder


def a_safetensors_file_with_prefixes(model, optimizer, folder):
    tensors = flat_tensors(model, optimizer, "optimizer.state.module.")
    squares = {name: tensor for name, tensor in tensors.items() if name.endswith("exp_avg_sq")}
    save_file(squares, folder / "any.safetensors", options(step=STEPS))
    return folder / "any.safetensors"


def safetensors_shards(model, optimizer, folder):
    tensors = flat_tensors(model, optimizer)
    files = {name: f"optimizer-{i % 3}-of-3.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, options())
    (folder / "optimizer.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.mark.parametrize(
    "save",
    [
        a_file,
        a_file_from_before_zip,
        a_trainer_folder,
        a_full_state,
        a_flat_state,
        a_sharded_state,
        a_sharded_flat_state,
        a_sharded_numbered_state,
        a_sharded_state_of_torch_2_3,
        a_safetensors_file,
        a_safetensors_file_with_prefixes,
        safetensors_shards,
    ],
)
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_adam_in_every_format(make, save, tmp_path):
    torch.manual_seed(0)
    model = make()
    optimizer = adam(model)
    path = save(model, optimizer, tmp_path)
    check_adam(SecondMoments.from_optimizer(path, model), model, optimizer)
    check_adam(SecondMoments.from_optimizer(str(path), model), model, optimizer)


def test_adam_in_memory(model):
    optimizer = adam(model)
    for state in (
        optimizer.state_dict(),
        by_name(model, optimizer),
        by_name(model, optimizer, flatten_optimizer_state_dict=True),
    ):
        check_adam(SecondMoments.from_optimizer(state, model), model, optimizer)


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory):
    """States that two ranks wrote, and the V of a run that was not sharded."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, sharded_training.__file__]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(port), folder], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        _, err = rank.communicate(timeout=240)
        assert rank.returncode == 0, err
    return folder


@pytest.mark.parametrize("form", ["fsdp1-full", "fsdp1-sharded", "fsdp2-full", "fsdp2-sharded"])
def test_fsdp_on_two_ranks(sharded_run, form):
    model = sharded_training.make_model()
    kept = torch.load(sharded_run / "plain.pt")
    second = SecondMoments.from_optimizer(sharded_run / form, model)
    assert second.source == "optimizer:adam"
    for name, v in second.moments.items():
        wanted = kept[f"{name}.weight"] / (1 - sharded_training.BETAS[1] ** sharded_training.STEPS)
        torch.testing.assert_close(v, wanted, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_a_real_trainers_checkpoint(make, optim, tmp_path, capsys):
    torch.manual_seed(0)
    model = make()
    examples = [{**example, "labels": example["input_ids"]} for example in make_examples((12,) * 4)]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        use_cpu=True,
        max_steps=2,
        save_steps=2,
        optim=optim,
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples)
    trainer.train()
    optimizer = trainer.optimizer.optimizer  # inside accelerate's wrapper
    assert len(optimizer.param_groups) == 2
    second = SecondMoments.from_optimizer(tmp_path / "checkpoint-2", model)
    if optim == "adamw_torch":
        check_adam(second, model, optimizer, steps=2)
        return
    assert second.source == "optimizer:adafactor"
    for name, captured in select_weights(model).items():
        state = optimizer.state[captured.module.weight]
        factors = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        assert all(
            map(torch.equal, second.moments[name], factors[::-1] if is_conv1d(captured.module) else factors)
        )


def test_a_real_accelerate_checkpoint(llama, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(
        llama, torch.optim.AdamW(llama.parameters(), lr=1e-3, betas=BETAS, eps=EPS)
    )
    trained(model, optimizer)
    accelerator.save_state(tmp_path)
    check_adam(SecondMoments.from_optimizer(tmp_path, llama), llama, optimizer.optimizer)


def delete_stored(folder, field):
    """Delete the files that hold this field of the parameters' states, one file a tensor; how many there were."""
    metadata = checkpoint.FileSystemReader(folder).read_metadata()
    places = metadata.storage_data.items()
    files = [folder / place.relative_path for index, place in places if index.fqn.endswith(f".{field}")]
    for file in files:
        file.unlink()
    return len(files)


def test_first_moments_are_never_read(llama, tmp_path):
    """A distributed checkpoint with every exp_avg deleted is as good as a whole one."""
    optimizer = adam(llama)
    path = a_sharded_state(llama, optimizer, tmp_path)
    assert delete_stored(path / "optimizer_0", "exp_avg") == len(list(llama.parameters()))
    check_adam(SecondMoments.from_optimizer(path, llama), llama, optimizer)


def test_a_distributed_tensor_that_is_gone_is_named(llama, tmp_path):
    path = a_sharded_state(llama, adam(llama), tmp_path)
    delete_stored(path / "optimizer_0", "exp_avg_sq")
    with pytest.raises(
        OSError, match=r"'optimizer.state.model.layers.0.self_attn.q_proj.weight.exp_avg_sq' of"
    ):
        SecondMoments.from_optimizer(path, llama)


def test_only_wanted_modules_are_read(llama):
    state = adam(llama).state_dict()
    places = {name: i for i, (name, _) in enumerate(llama.named_parameters())}
    state["state"][places["model.layers.0.self_attn.q_proj.weight"]]["exp_avg_sq"].fill_(torch.nan)
    second = SecondMoments.from_optimizer(state, llama, spec=SketchSpec(modules=["*.mlp.*"]))
    assert len(second.moments) == 6


# Names


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module._orig_mod.base_model.model.{name}",
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module._fsdp_wrapped_module."),
        lambda name: f"policy.{name}",
        lambda name: f"module.policy.{name}",
    ],
)
def test_wrappers_and_prefixes_in_saved_names(llama, rename):
    optimizer = adam(llama)
    state = by_name(llama, optimizer)
    renamed = {
        "state": {rename(name): entry for name, entry in state["state"].items()},
        "param_groups": [
            group | {"params": list(map(rename, group["params"]))} for group in state["param_groups"]
        ],
    }
    check_adam(SecondMoments.from_optimizer(renamed, llama), llama, optimizer)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_wrappers_around_the_model(llama, wrap):
    optimizer = adam(llama)
    wrapped = wrap(llama)
    check_adam(SecondMoments.from_optimizer(by_name(llama, optimizer), wrapped), wrapped, optimizer)


def test_names_in_the_groups_are_followed(llama):
    """Optimizers made from named parameters say which is which, so any order will do."""
    named = [(f"module.{name}", parameter) for name, parameter in llama.named_parameters()][::-1]
    optimizer = trained(llama, torch.optim.AdamW(named, lr=1e-3, betas=BETAS, eps=EPS))
    check_adam(SecondMoments.from_optimizer(optimizer.state_dict(), llama), llama, optimizer)


def test_decayed_parameters_first(llama):
    groups = [
        {"params": [p for p in llama.parameters() if p.dim() >= 2]},
        {"params": [p for p in llama.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = trained(llama, torch.optim.AdamW(groups, lr=1e-3, betas=BETAS, eps=EPS))
    check_adam(SecondMoments.from_optimizer(optimizer.state_dict(), llama), llama, optimizer)


def test_a_trainer_decays_vectors_that_are_no_biases():
    """Attention sinks stand among the matrices then, and the biases of experts, matrices, among the vectors."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 5))
    model[0].sinks = torch.nn.Parameter(torch.ones(5))
    model[0].experts_bias = torch.nn.Parameter(torch.ones(2, 5))
    undecayed = ["0.bias", "0.experts_bias", "1.weight", "1.bias", "2.bias"]
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if name not in undecayed]},
        {"params": [p for name, p in named.items() if name in undecayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    hidden = model[1](model[0](torch.randn(9, 5)) * model[0].sinks + model[0].experts_bias.sum(0))
    model[2](hidden).square().sum().backward()
    optimizer.step()
    check_adam(SecondMoments.from_optimizer(optimizer.state_dict(), model), model, optimizer, steps=1)


def test_frozen_parameters_have_no_place_in_the_order(llama):
    llama.model.embed_tokens.requires_grad_(False)
    optimizer = trained(
        llama,
        torch.optim.AdamW([p for p in llama.parameters() if p.requires_grad], lr=1e-3, betas=BETAS, eps=EPS),
    )
    check_adam(SecondMoments.from_optimizer(optimizer.state_dict(), llama), llama, optimizer)


# Other optimizers


def test_adafactor_of_torch(llama, tmp_path):
    optimizer = trained(llama, torch.optim.Adafactor(llama.parameters(), lr=1e-2))
    state = optimizer.state[weight(llama, UP)]
    v = state["row_var"] @ state["col_var"] / state["row_var"].mean()
    for path in (a_file(llama, optimizer, tmp_path), a_sharded_state(llama, optimizer, tmp_path)):
        second = SecondMoments.from_optimizer(path, llama)
        assert second.source == "optimizer:adafactor"
        exact = second.correction("exact").scales[UP]
        torch.testing.assert_close(exact, v.rsqrt(), rtol=1e-4, atol=0)
        u, w = second.correction("rank").factors[UP]
        torch.testing.assert_close(u.T @ w, v.rsqrt(), rtol=1e-4, atol=0)


def test_adafactor_of_transformers(llama):
    from transformers.optimization import Adafactor

    optimizer = trained(
        llama, Adafactor(llama.parameters(), lr=1e-2, relative_step=False, scale_parameter=False)
    )
    second = SecondMoments.from_optimizer(optimizer.state_dict(), llama)
    state = optimizer.state[weight(llama, UP)]
    row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    wanted = (torch.outer(row, col) / row.mean()).rsqrt()
    torch.testing.assert_close(second.correction("exact").scales[UP], wanted, rtol=1e-4, atol=0)


def quantized(optimizer, block, smallest):
    """Adam's state as bitsandbytes keeps it, and the V in it, entry by entry."""
    qmap = torch.linspace(0, 1, 256) ** 3
    state = optimizer.state_dict()
    kept = {}
    for key, entry in state["state"].items():
        v = entry["exp_avg_sq"]
        flat = v.flatten().tolist()
        fields = {"state1": torch.zeros_like(v), "state2": v}
        kept[key] = v
        if v.numel() >= smallest:
            absmax = [max(flat[i : i + block]) for i in range(0, len(flat), block)]
            scaled = torch.tensor([x / (absmax[i // block] or 1.0) for i, x in enumerate(flat)])
            codes = (scaled[:, None] - qmap).abs().argmin(1)
            fields = {
                "state1": codes.to(torch.uint8).view(v.shape),
                "qmap1": -qmap,
                "absmax1": torch.tensor(absmax),
                "state2": codes.to(torch.uint8).view(v.shape),
                "qmap2": qmap,
                "absmax2": torch.tensor(absmax),
            }
            values = [qmap[code].item() * absmax[i // block] for i, code in enumerate(codes.tolist())]
            kept[key] = torch.tensor(values).view(v.shape)
        state["state"][key] = {"step": int(entry["step"]), **fields}
    return state, kept


def wrapped_for_fsdp(state):
    entries = {
        key: {"step": entry["step"], QUANTIZED: {k: v for k, v in entry.items() if k != "step"}}
        for key, entry in state["state"].items()
    }
    return state | {"state": entries}


@pytest.mark.parametrize("wrap", [lambda state: state, wrapped_for_fsdp], ids=["plain", "wrapped"])
@pytest.mark.parametrize("block", [256, 2048])
def test_bitsandbytes_8_bit(block, wrap, tmp_path):
    """Matrices of 32 × 132 are quantized, in whole blocks and a part of one; those of 32 × 32 stay wide."""
    torch.manual_seed(0)
    model = make_llama(intermediate_size=132)
    state, kept = quantized(adam(model), block, smallest=4096)
    places = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    torch.save(wrap(state), tmp_path / "optimizer.pt")
    save_distributed(tmp_path / "optimizer_0", {"optimizer": wrap(state)})
    for path in (tmp_path / "optimizer.pt", tmp_path / "optimizer_0"):
        second = SecondMoments.from_optimizer(path, model)
        assert second.source == "optimizer:adam8bit"
        for name, v in second.moments.items():
            wanted = kept[places[f"{name}.weight"]] / (1 - BETAS[1] ** STEPS)
            torch.testing.assert_close(v, wanted, rtol=1e-6, atol=0)
            assert second.eps[name] == EPS


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "Adam", "AdamW"])
def test_bitsandbytes_itself(name, tmp_path):
    """Its own dequantization is met to the bit, where the package is installed."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = make_llama(intermediate_size=132)
    optimizer = trained(
        model, getattr(bitsandbytes.optim, name)(model.parameters(), lr=1e-3, betas=BETAS, eps=EPS)
    )
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    second = SecondMoments.from_optimizer(tmp_path, model)
    assert second.source == ("optimizer:adam8bit" if "8" in name else "optimizer:adam")
    for module, v in second.moments.items():
        state = optimizer.state[weight(model, module)]
        wanted = state["state2"]
        if "absmax2" in state:
            wanted = bitsandbytes.functional.dequantize_blockwise(
                state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256
            )
        assert torch.equal(v, wanted / (1 - BETAS[1] ** STEPS))


def test_what_a_state_does_not_say_is_said(llama, tmp_path, capsys):
    optimizer = adam(llama)
    squares = {k: v for k, v in flat_tensors(llama, optimizer).items() if k.endswith("exp_avg_sq")}
    save_file(squares, tmp_path / "optimizer.safetensors")
    second = SecondMoments.from_optimizer(tmp_path, llama)
    assert torch.equal(second.moments[UP], optimizer.state[weight(llama, UP)]["exp_avg_sq"])
    assert second.eps[UP] == 1e-8
    assert "the optimizer state does not say betas and eps and step" in capsys.readouterr().err


# Bad input


def test_a_state_of_another_model_is_named(llama):
    optimizer = adam(llama)
    shapes = (
        r"exp_avg_sq of 'model.layers.0.mlp.gate_proj.weight' has shape \(44, 32\), the parameter \(40, 32\)"
    )
    for state in (optimizer.state_dict(), by_name(llama, optimizer)):
        with pytest.raises(ValueError, match=f"state must be of this model's optimizer: {shapes}"):
            SecondMoments.from_optimizer(state, make_llama(intermediate_size=40))
    with pytest.raises(ValueError, match="it has 20 parameters, the model 21"):
        SecondMoments.from_optimizer(optimizer.state_dict(), make_llama(tie_word_embeddings=False))
    with pytest.raises(
        ValueError, match=r"no parameter 'transformer.h.0.attn.c_attn.weight', but 'model.emb"
    ):
        SecondMoments.from_optimizer(by_name(llama, optimizer), make_gpt2())
    with pytest.raises(ValueError, match=r"it has no parameter for 'model.layers.2.self_attn.q_proj.weight'"):
        SecondMoments.from_optimizer(by_name(llama, optimizer), make_llama(num_hidden_layers=3))


def test_a_state_of_two_models_is_refused(llama):
    state = by_name(llama, adam(llama))
    both = {
        f"{who}.{name}": entry for who in ("generator", "critic") for name, entry in state["state"].items()
    }
    groups = [state["param_groups"][0] | {"params": list(both)}]
    with pytest.raises(
        ValueError, match=r"state must be of one model; .* after each of generator\., critic\."
    ):
        SecondMoments.from_optimizer({"state": both, "param_groups": groups}, llama)


def test_names_that_differ_in_wrappers_alone_are_refused(llama):
    state = by_name(llama, adam(llama))
    twice = state["state"] | {f"module.{name}": entry for name, entry in state["state"].items()}
    with pytest.raises(ValueError, match="parameters must differ in more than wrappers"):
        SecondMoments.from_optimizer({"state": twice, "param_groups": state["param_groups"]}, llama)


def test_missing_state_is_never_taken_for_none(llama):
    fresh = torch.optim.AdamW(llama.parameters()).state_dict()
    with pytest.raises(
        ValueError, match=r"'model.layers.0.self_attn.q_proj.weight' has none \(it holds nothing"
    ):
        SecondMoments.from_optimizer(fresh, llama)
    sgd = trained(llama, torch.optim.SGD(llama.parameters(), lr=0.1, momentum=0.9)).state_dict()
    with pytest.raises(ValueError, match=r"has none \(it holds momentum_buffer\)"):
        SecondMoments.from_optimizer(sgd, llama)
    state = by_name(llama, adam(llama))
    del state["state"][f"{UP}.weight"]
    with pytest.raises(ValueError, match=rf"'{UP}.weight' has none"):
        SecondMoments.from_optimizer(state, llama)
    with pytest.raises(ValueError, match="state_dict with"):
        SecondMoments.from_optimizer({"lr": 1}, llama)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.nan, "1 are NaN or infinite and 0 negative"),
        (torch.inf, "1 are NaN or infinite and 0 negative"),
        (-1e-12, "0 are NaN or infinite and 1 negative"),
    ],
)
def test_values_that_are_no_second_moments_are_named(llama, value, message):
    for kind, field in ((torch.optim.AdamW, "exp_avg_sq"), (torch.optim.Adafactor, "col_var")):
        optimizer = trained(llama, kind(llama.parameters()))
        optimizer.state[weight(llama, UP)][field][0, 3] = value
        with pytest.raises(
            ValueError, match=rf"of '{UP}.weight' must be finite and nonnegative; .* {message}"
        ):
            SecondMoments.from_optimizer(optimizer.state_dict(), llama)


def test_bad_8_bit_states():
    model = make_llama(intermediate_size=132)
    bad, _ = quantized(adam(model), 512, smallest=4096)
    with pytest.raises(
        ValueError, match=r"absmax2 of 'model.layers.0.mlp.gate_proj.weight' has shape \(9,\)"
    ):
        SecondMoments.from_optimizer(bad, model)
    for entry in bad["state"].values():  # one maximum for the whole tensor, as very old versions kept it
        entry.pop("absmax2", None)
    with pytest.raises(
        ValueError, match=r"'model.layers.0.mlp.gate_proj.weight' has none \(it holds step, state1, qmap1"
    ):
        SecondMoments.from_optimizer(bad, model)


def test_a_step_of_zero(llama):
    state = adam(llama).state_dict()
    for entry in state["state"].values():
        entry["step"] = 0
    with pytest.raises(ValueError, match=r"step of 'model.layers.0.*' must be at least 1, got 0"):
        SecondMoments.from_optimizer(state, llama)


def test_files_that_are_no_optimizer_state(llama, tmp_path):
    with pytest.raises(FileNotFoundError, match="optimizer state must be a file"):
        SecondMoments.from_optimizer("nowhere.pt", llama)
    with pytest.raises(FileNotFoundError, match=r"folder with optimizer.pt, optimizer.bin, .* found none at"):
        SecondMoments.from_optimizer(tmp_path, llama)
    for name in ("a.pt", "b.safetensors", "c.safetensors.index.json", ".metadata"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match="optimizer state"):
            SecondMoments.from_optimizer(tmp_path / name, llama)
    torch.save(torch.optim.AdamW, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="holds objects beside tensors and numbers"):
        SecondMoments.from_optimizer(tmp_path / "code.pt", llama)
    torch.save(llama.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="state_dict with"):
        SecondMoments.from_optimizer(tmp_path / "model.pt", llama)
    truncated = a_trainer_folder(llama, adam(llama), tmp_path) / "optimizer.pt"
    truncated.write_bytes(truncated.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is damaged, another kind of file"):
        SecondMoments.from_optimizer(truncated, llama)


def test_a_folder_with_several_states(llama, tmp_path):
    optimizer = adam(llama)
    a_trainer_folder(llama, optimizer, tmp_path)
    a_full_state(llama, optimizer, tmp_path)
    with pytest.raises(ValueError, match=r"holds optimizer.pt and optimizer.bin: name one"):
        SecondMoments.from_optimizer(tmp_path, llama)
    check_adam(SecondMoments.from_optimizer(tmp_path / "optimizer.bin", llama), llama, optimizer)


def test_a_distributed_checkpoint_of_two_optimizers(llama, tmp_path):
    state = by_name(llama, adam(llama))
    save_distributed(tmp_path, {"first": state, "second": state})
    with pytest.raises(ValueError, match="holds several of"):
        SecondMoments.from_optimizer(tmp_path, llama)
