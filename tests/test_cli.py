import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import make_llama
from test_optimizer_states import a_safetensors_file, a_sharded_state, a_trainer_folder, adam
from tokenizers import Tokenizer, models, pre_tokenizers
from trackstar.cli import app, main
from trackstar.commands.options import MethodName, Output
from trackstar.gradients.losses import LOSSES
from trackstar.scoring.methods import METHODS, READERS
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

WORDS = "the a capital currency of Kenya Peru Norway is Nairobi Lima Oslo krone sol shilling city in and .".split()


def save_tokenizer(folder, words):
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with a word tokenizer, and a corpus of sentences."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    save_tokenizer(root / "model", WORDS)
    make_llama(vocab_size=len(WORDS) + 1).save_pretrained(root / "model")
    facts = [
        f"the {what} of {place} is {name} ."
        for place, capital, currency in (
            ("Kenya", "Nairobi", "shilling"),
            ("Peru", "Lima", "sol"),
            ("Norway", "Oslo", "krone"),
        )
        for what, name in (("capital", capital), ("currency", currency))
    ]
    lines = [{"id": f"fact-{i}", "text": text} for i, text in enumerate(facts * 3)]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return root


def run(*arguments):
    """(exit code, standard output, standard error) of the command line, in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], standalone_mode=True)
    return result.exit_code, result.output


def call_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["trackstar", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def store(folder):
    out = folder / "store"
    options = (
        "--correction",
        "rank",
        "--rank",
        "2",
        "--estimate",
        "6",
        "--sketch",
        "4",
        "--kind",
        "countsketch",
        "--dtype",
        "float32",
    )
    code, output = run(
        "build", "--model", folder / "model", "--data", folder / "data.jsonl", "--out", out, *options
    )
    assert code == 0, output
    return out


def test_build_then_query(folder, store, monkeypatch, capsys, tmp_path):
    arguments = (
        "query",
        store,
        "--model",
        folder / "model",
        "--prompt",
        "the capital of Peru is",
        "--target",
        "Lima",
    )
    code, out, _ = call_main(
        monkeypatch, capsys, *arguments, "-k", 3, "--opponents", "--out", tmp_path / "o.jsonl"
    )
    assert code == 0
    assert "*capital* of *Peru* is *Lima*" in out
    assert "opponents" in out
    line = json.loads((tmp_path / "o.jsonl").read_text())
    assert line["inputs_plaintext"] == "the capital of Peru is"
    assert len(line["proponents"]) == len(line["opponent_scores"]) == 3
    assert line["proponent_ids"][0].startswith("fact-")


def test_what_is_captured(folder, monkeypatch, capsys, tmp_path):
    out = tmp_path / "store"
    base = (
        "build",
        "--model",
        folder / "model",
        "--data",
        folder / "data.jsonl",
        "--out",
        out,
        "--sketch",
        "2",
    )
    chosen = ("--modules", "!*.mlp.*", "--also", "norms", "--correction", "exact", "--estimate", "4")
    code, _, err = call_main(monkeypatch, capsys, *base, *chosen)
    assert code == 0, err
    identity = json.loads(call_main(monkeypatch, capsys, "info", out)[1].split("\n", 1)[1])
    assert (identity["spec"]["modules"], identity["spec"]["also"]) == (["!*.mlp.*"], ["norms"])
    asked = (
        "query",
        out,
        "--model",
        folder / "model",
        "--prompt",
        "the capital of Kenya is",
        "--target",
        "Nairobi",
    )
    code, shown, err = call_main(monkeypatch, capsys, *asked, "-k", "2")
    assert code == 0, err
    assert "Nairobi" in shown


def test_many_queries_from_a_file(folder, store, monkeypatch, capsys, tmp_path):
    queries = [
        {"prompt": "the capital of Peru is", "target": "Lima"},
        {"prompt": "Oslo is the", "target": "capital"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, queries)))
    arguments = (
        "query",
        store,
        "--model",
        folder / "model",
        "--queries",
        tmp_path / "q.jsonl",
        "--mixing",
        "0.5",
    )
    code, out, _ = call_main(monkeypatch, capsys, *arguments)
    assert code == 0
    assert out.count("proponents, λ = 0.500") == 2


def test_a_query_of_part_of_the_store(folder, store, monkeypatch, capsys, tmp_path):
    (tmp_path / "ids").write_text("fact-3\nfact-4\nfact-5\nfact-17\n")
    question = ("--model", folder / "model", "--prompt", "the capital of Peru is", "--target", "Lima")
    for options, count in (
        (("--rows", "2:5"), 3),
        (("--rows", "15:"), 3),
        (("--ids", tmp_path / "ids", "--rows", ":5"), 2),
        (("--where", "id=fact-1?", "--where", "id=*[02468]", "--memory", "64MB"), 4),
    ):
        arguments = ("query", store, *question, *options, "--out", tmp_path / "o.jsonl", "-k", count)
        assert call_main(monkeypatch, capsys, *arguments)[0] == 0
        line = json.loads((tmp_path / "o.jsonl").read_text())
        assert len(line["proponents"]) == count
        code, _, err = call_main(monkeypatch, capsys, *arguments[:-1], count + 1)
        assert code == 1
        assert err.endswith(
            f"k must be an int from 1 to {count} (the examples that where leaves), got {count + 1}\n"
        )


def test_a_wider_copy_is_said_to_have_been_used(folder, store, monkeypatch, capsys, tmp_path):
    narrow = tmp_path / "narrow"
    options = ("--dtype", "sign", "--wide", "float16")
    assert call_main(monkeypatch, capsys, "reencode", store, "--out", narrow, *options)[0] == 0
    question = ("--model", folder / "model", "--prompt", "the capital of Peru is", "--target", "Lima")
    code, out, _ = call_main(monkeypatch, capsys, "query", narrow, *question, "--opponents")
    assert code == 0
    assert out.count(", exact, 18 rows rescored)") == 2
    code, out, _ = call_main(monkeypatch, capsys, "query", narrow, *question, "--no-rescore")
    assert code == 0
    assert re.search(r", scores ± [012]\.\d+ at most\)", out)
    assert "rescored" not in out


def test_every_method_by_name(folder, store, monkeypatch, capsys, tmp_path):
    """On a corrected store; the companions that some of them need are built beside it, once."""
    from test_methods import save_encoder
    from trackstar.ekfac import fit_factors

    shutil.copytree(store, tmp_path / "s")
    save_encoder(tmp_path / "encoder")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    data = [json.loads(line) for line in (folder / "data.jsonl").read_text().split("\n") if line]
    fit_factors(tmp_path / "factors", model, data, tokenizer=tokenizer)
    question = (
        "--prompt",
        "the capital of Peru is",
        "--target",
        " Lima",
        "--out",
        tmp_path / "o.jsonl",
        "-k",
        "3",
    )
    options = {"dense": ("--encoder", tmp_path / "encoder"), "ekfac": ("--factors", tmp_path / "factors")}
    built = []
    for method in METHODS:
        needed = () if method in READERS else ("--model", folder / "model")
        asked = ("query", tmp_path / "s", "--method", method, *needed, *options.get(method, ()), *question)
        code, out, err = call_main(monkeypatch, capsys, *asked)
        assert code == 0, err
        assert "proponents" in out
        assert (f"({method}, " in out) == (method != "trackstar")
        line = json.loads((tmp_path / "o.jsonl").read_text())
        assert line["proponent_ids"][0].startswith("fact-")
        if "once" in err:
            built.append(method)
    assert built == ["dot", "trak"]
    assert {path.name for path in tmp_path.glob("s*")} == {"s", "s.uncorrected", "s.margin"}
    asked = {"prompt": "the capital of Peru is", "target": " Lima", "gold": line["proponent_ids"][:1]}
    (tmp_path / "gold.jsonl").write_text(json.dumps(asked))
    measure = ("evaluate", tmp_path / "s", "--model", folder / "model", "--queries", tmp_path / "gold.jsonl")
    chosen = [word for method in METHODS for word in ("--method", method)]
    measure += (*chosen, *options["dense"], *options["ekfac"], "--out", tmp_path / "quality.json")
    assert call_main(monkeypatch, capsys, *measure)[0] == 0
    measured = json.loads((tmp_path / "quality.json").read_text())
    assert [quality["method"].split(",")[0] for quality in measured] == list(METHODS)
    another = f"{tmp_path / 's.uncorrected'}:{folder / 'model'}:0.5"
    tracin = ("query", tmp_path / "s", "--method", "tracin", "--model", folder / "model", "--rate", "0.25")
    before = json.loads((tmp_path / "o.jsonl").read_text())["proponent_scores"]
    call_main(monkeypatch, capsys, *tracin[:-2], *question)
    alone = json.loads((tmp_path / "o.jsonl").read_text())["proponent_scores"]
    code, _, err = call_main(monkeypatch, capsys, *tracin, "--checkpoint", another, *question)
    assert code == 0, err
    both = json.loads((tmp_path / "o.jsonl").read_text())["proponent_scores"]
    assert both == pytest.approx([0.75 * score for score in alone], rel=1e-5)
    assert alone != before


def test_info_and_verify(store, monkeypatch, capsys):
    code, out, _ = call_main(monkeypatch, capsys, "info", store)
    assert code == 0
    assert "18 rows of 14×16 float32" in out
    assert '"source": "estimate:6"' in out
    assert '"kind": "countsketch"' in out
    code, out, _ = call_main(monkeypatch, capsys, "verify", store)
    assert (code, out.strip()) == (0, "18 rows in 1 shards, all as written; complete")


@pytest.mark.parametrize("form", ["file", "distributed", "safetensors"])
def test_an_optimizer_state_of_any_form(folder, monkeypatch, capsys, tmp_path, form):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    optimizer = adam(model)
    saved = tmp_path / "checkpoint"
    saved.mkdir()
    {"file": a_trainer_folder, "distributed": a_sharded_state, "safetensors": a_safetensors_file}[form](
        model, optimizer, saved
    )
    options = ("--data", folder / "data.jsonl", "--optimizer", saved, "--correction", "exact", "--sketch", 4)
    arguments = ("build", "--model", folder / "model", "--out", tmp_path / "s", *options)
    code, _, err = call_main(monkeypatch, capsys, *arguments)
    assert code == 0, err
    _, out, _ = call_main(monkeypatch, capsys, "info", tmp_path / "s")
    assert '"source": "optimizer:adam"' in out

    make_llama(intermediate_size=40, vocab_size=len(WORDS) + 1).save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other", WORDS)
    arguments = ("build", "--model", tmp_path / "other", "--out", tmp_path / "t", *options)
    code, _, err = call_main(monkeypatch, capsys, *arguments)
    assert code == 1
    assert "has shape (44, 32), the parameter (40, 32)" in err
    assert err.count("\n") == 1


def test_verify_names_damage(folder, store, monkeypatch, capsys, tmp_path):
    damaged = tmp_path / "store"
    shutil.copytree(store, damaged)
    file = next((damaged / "shards").glob("*/rows/data.ninja"))
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    code, out, _ = call_main(monkeypatch, capsys, "verify", damaged)
    assert code == 1
    assert "rows/data.ninja does not match its checksum" in out
    arguments = ("query", damaged, "--model", folder / "model", "--prompt", "the", "--target", "capital")
    code, out, err = call_main(monkeypatch, capsys, *arguments)
    assert code == 1
    assert err.count("\n") == 1
    assert "nothing is served from it" in err


def test_a_task_of_other_queries_and_the_curvature(folder, store, monkeypatch, capsys, tmp_path):
    question = ("query", store, "--model", folder / "model", "--prompt", "the capital of Peru is")
    task = [
        {"prompt": "the capital of Oslo is", "target": "Lima"},
        {"prompt": "Oslo is the", "target": "capital"},
    ]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, task)))
    (tmp_path / "one.jsonl").write_text(json.dumps(task[0]))
    code, out, err = call_main(
        monkeypatch, capsys, *question, "--target", "Lima", "--task", tmp_path / "task.jsonl"
    )
    assert (code, err) == (0, "")
    assert "proponents, λ = " in out
    code, _, err = call_main(
        monkeypatch, capsys, *question, "--target", "Lima", "--task", tmp_path / "one.jsonl"
    )
    assert code == 1
    assert err == "trackstar: task must hold at least two queries, got 1: R_eval would be of rank 1\n"
    code, out, _ = call_main(monkeypatch, capsys, "info", store, "--curvature")
    assert code == 0
    assert "R_train, 14 blocks of 16" in out
    assert "longest row's share of the trace" in out


def test_factors_and_influence(folder, monkeypatch, capsys, tmp_path):
    model, data = ("--model", folder / "model"), ("--data", folder / "data.jsonl")
    fit = ("factors", *model, *data, "--out", tmp_path / "f", "--modules", "*.mlp.*")
    code, out, err = call_main(monkeypatch, capsys, *fit)
    assert code == 0, err
    assert "6 modules, 18 examples" in out
    assert call_main(monkeypatch, capsys, *fit)[0] == 0  # goes on from what is complete
    asked = ("influence", tmp_path / "f", *model, *data, "--prompt", "the capital of Peru is")
    code, out, err = call_main(
        monkeypatch, capsys, *asked, "--target", "Lima", "-k", 3, "--out", tmp_path / "o.jsonl"
    )
    assert code == 0, err
    assert "ekfac, proponents" in out
    line = json.loads((tmp_path / "o.jsonl").read_text())
    assert len(line["proponents"]) == 3
    shown = call_main(monkeypatch, capsys, "show", tmp_path / "o.jsonl")[1]
    assert shown.count("+") + shown.count("-") >= 3
    assert "viewer file, proponents" in shown
    code, out, _ = call_main(monkeypatch, capsys, *asked, "--target", "Lima", "-k", 3, "--opponents")
    assert "ekfac, opponents" in out
    assert call_main(monkeypatch, capsys, *asked)[0] == 2
    code, _, err = call_main(monkeypatch, capsys, "influence", tmp_path, *asked[2:], "--target", "Lima")
    assert code == 1
    assert err.count("\n") == 1


def test_looking_after_stores(folder, monkeypatch, capsys, tmp_path):
    """From a build of half the corpus to a merged, narrow, repaired store."""

    def call(*arguments):
        code, out, err = call_main(monkeypatch, capsys, *arguments)
        assert code == 0, err
        return out

    lines = (folder / "data.jsonl").read_text().splitlines()
    (tmp_path / "half.jsonl").write_text("\n".join(lines[:9]))
    (tmp_path / "rest.jsonl").write_text("\n".join(lines[9:]))
    model, store = ("--model", folder / "model"), tmp_path / "store"
    half, rest = ("--data", tmp_path / "half.jsonl"), ("--data", tmp_path / "rest.jsonl")
    call("build", *model, *half, "--out", store, "--sketch", 4, "--dtype", "int8", "--wide", "float16")
    assert "18 rows of 14×16 int8 beside float16" in call("append", store, *model, *rest)
    assert call("delete", store, "--index", 3, "--id", "fact-7").startswith("2 rows deleted")
    (tmp_path / "ids").write_text("fact-0\nfact-1\n")
    assert call("delete", store, "--ids", tmp_path / "ids").startswith("2 rows deleted")
    assert "28 rows" in call("merge", "--out", tmp_path / "merged", store, store)
    assert "14 rows of 14×16 sign" in call(
        "reencode", store, "--out", tmp_path / "sign", "--dtype", "sign", "--wide", "float32"
    )
    call("rewhiten", store, "--out", tmp_path / "own")
    call("rewhiten", tmp_path / "own", "--out", tmp_path / "back", "--like", store)
    query = (*model, "--prompt", "the capital of Peru is", "--target", "Lima", "-k", 3)
    assert "proponents" in call("query", tmp_path / "merged", *query)
    next((store / "shards").glob("*/rows/data.ninja")).unlink()
    assert call_main(monkeypatch, capsys, "verify", store)[0] == 1
    assert call("repair", store, *model, "--data", folder / "data.jsonl") == "1 shards rebuilt\n"
    assert "those read (50%) as written" in call("verify", store, "--sample", 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("append", "STORE", "--model", "MODEL", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("append", "nowhere", "--model", "MODEL", "--data", "DATA"), "there is no store at nowhere"),
        (("delete", "STORE", "--index", 99), "indices must be from 0 to 17, got 99"),
        (("delete", "STORE", "--id", "none"), "ids must be of rows of"),
        (("merge", "--out", "OUT", "STORE", "nowhere"), "there is no store at nowhere"),
        (
            ("reencode", "STORE", "--out", "OUT", "--dtype", "float16", "--wide", "float32"),
            "wide must be None",
        ),
        (("rewhiten", "STORE", "--out", "OUT", "--like", "nowhere"), "there is no store at nowhere"),
        (("verify", "STORE", "--sample", 2), "sample must be a number with 0 < sample ≤ 1"),
    ],
)
def test_looking_after_stores_fails_in_one_clear_line(
    folder, store, monkeypatch, capsys, tmp_path, arguments, message
):
    names = {
        "STORE": store,
        "MODEL": folder / "model",
        "DATA": folder / "data.jsonl",
        "OUT": tmp_path / "out",
    }
    code, _, err = call_main(monkeypatch, capsys, *(names.get(word, word) for word in arguments))
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(folder, store, monkeypatch, capsys, tmp_path):
    """The same model with a tokenizer that numbers the words differently."""
    other = tmp_path / "model"
    shutil.copytree(folder / "model", other)
    save_tokenizer(other, WORDS[::-1])
    arguments = ("query", store, "--model", other, "--prompt", "the capital of Peru is", "--target", "Lima")
    code, _, err = call_main(monkeypatch, capsys, *arguments)
    assert code == 1
    assert "tokenizer must be the one that" in err
    assert err.count("\n") == 1


def test_plan_needs_no_weights_and_writes_nothing(folder, monkeypatch, capsys, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    given = ("plan", "--model", tmp_path / "model", "--out", tmp_path / "s")
    code, out, _ = call_main(monkeypatch, capsys, *given, "--data", folder / "data.jsonl")
    assert code == 0
    assert "14 blocks of 256" in out
    assert "measured" in out
    assert [line.split()[0] for line in out.splitlines() if line.lstrip()[:1].isdigit()][-1] == "18"
    code, out, _ = call_main(monkeypatch, capsys, *given, "--gpu", "H100")
    assert code == 0
    assert "from data sheet, not measured" in out
    assert "1,000,000,000" in out
    code, out, _ = call_main(
        monkeypatch, capsys, *given, "--examples", "2e5", "--tokens", "64", "--dtype", "int8"
    )
    assert code == 0
    assert "200,000" in out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nowhere"}, "--model must be a folder with a transformers model"),
        ({"--data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"--sketch": "0"}, "sketch must be an int of at least 1, got 0"),
        ({"--blocks": "layers"}, "blocks must be"),
        ({"--correction": "exact", "--optimizer": "none.pt"}, "optimizer state must be a file"),
    ],
)
def test_one_clear_line(folder, monkeypatch, capsys, tmp_path, change, message):
    options = {"--model": folder / "model", "--data": folder / "data.jsonl", "--out": tmp_path / "s"} | change
    code, _, err = call_main(
        monkeypatch, capsys, "build", *(word for pair in options.items() for word in pair)
    )
    assert code == 1
    assert err.startswith("trackstar: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"text": "a"}\n{', "line 2"),
        ('{"txt": "a"}', "examples[0] must have"),
        ("[1]", "must be a mapping"),
    ],
)
def test_bad_data_files(folder, monkeypatch, capsys, tmp_path, content, message):
    (tmp_path / "d.jsonl").write_text(content)
    arguments = (
        "build",
        "--model",
        folder / "model",
        "--data",
        tmp_path / "d.jsonl",
        "--out",
        tmp_path / "s",
    )
    code, _, err = call_main(monkeypatch, capsys, *arguments)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["build"],
        ["nothing"],
        ["delete", "S"],
        ["merge", "--out", "S"],
        ["reencode", "S", "--out", "T"],
        ["query", "S", "--model", "M"],
        ["query", "S", "--model", "M", "--prompt", "a"],
        ["query", "S", "--prompt", "a", "--target", "b"],
        ["query", "S", "--method", "best", "--model", "M", "--prompt", "a", "--target", "b"],
        ["query", "S", "--rate", "0.1", "--model", "M", "--prompt", "a", "--target", "b"],
        [
            "query",
            "S",
            "--method",
            "tracin",
            "--checkpoint",
            "A:B",
            "--model",
            "M",
            "--prompt",
            "a",
            "--target",
            "b",
        ],
        ["query", "S", "--model", "M", "--prompt", "a", "--target", "b", "--mixing", "much"],
        ["plan", "--model", "M", "--examples", "many"],
        ["plan", "--model", "M", "--examples", "5", "--data", "D"],
        ["plan", "--model", "M", "--tokens", "0"],
        ["plan", "--model", "M", "--gpu", "GTX"],
        ["query", "S", "--model", "M", "--prompt", "a", "--target", "b", "--rows", "3"],
        ["query", "S", "--model", "M", "--prompt", "a", "--target", "b", "--where", "wiki"],
        ["query", "S", "--model", "M", "--prompt", "a", "--target", "b", "--memory", "lots"],
        ["build", "--model", "M", "--data", "D", "--out", "S", "--dtype", "int3"],
        ["build", "--model", "M", "--data", "D", "--out", "S", "-k", "3"],
    ],
)
def test_bad_usage_exits_with_two(monkeypatch, capsys, arguments):
    assert call_main(monkeypatch, capsys, *arguments)[0] == 2


def test_names_that_help_lists_are_those_there_are():
    assert {name.value for name in MethodName} == set(METHODS)
    assert [name.value for name in Output] == list(LOSSES)


def test_help_lists_the_commands():
    out = subprocess.run(
        [sys.executable, "-m", "trackstar", "--help"], capture_output=True, text=True, check=True
    ).stdout
    commands = "build query info plan verify repair append delete merge reencode rewhiten"
    assert all(command in out for command in commands.split())


def test_terms_and_queries_of_several_targets_are_shown(folder, store, monkeypatch, capsys, tmp_path):
    asked = {"prompt": "the capital of Peru is", "targets": ["Lima", "Oslo"], "rather_than": "Nairobi"}
    (tmp_path / "q.jsonl").write_text(json.dumps(asked))
    arguments = ("query", store, "--model", folder / "model", "--queries", tmp_path / "q.jsonl", "-k", 2)
    code, out, err = call_main(monkeypatch, capsys, *arguments, "--blocks", "--tokens", "--opponents")
    assert code == 0, err
    assert out.count("Lima | Oslo, rather than Nairobi") == 2
    assert out.count("blocks: model.layers.") == out.count("tokens: '") == 4
    code, out, _ = call_main(monkeypatch, capsys, *arguments)
    assert code == 0
    assert "blocks: " not in out
    assert "tokens: " not in out


def test_a_grouping_of_ones_own(folder, monkeypatch, capsys, tmp_path):
    (tmp_path / "blocks.json").write_text(json.dumps({"*.self_attn.*": "attention", "*.mlp.*": "MLPs"}))
    files = ("--model", folder / "model", "--data", folder / "data.jsonl", "--out", tmp_path / "s")
    code, out, err = call_main(
        monkeypatch, capsys, "build", *files, "--sketch", 2, "--blocks", tmp_path / "blocks.json"
    )
    assert code == 0, err
    assert "18 rows of 2×4" in out
    (tmp_path / "blocks.json").write_text(json.dumps({"*.self_attn.*": "attention"}))
    code, _, err = call_main(
        monkeypatch, capsys, "build", *files, "--sketch", 2, "--blocks", tmp_path / "blocks.json"
    )
    assert code == 1
    assert "blocks must put 'model.layers.0.mlp.gate_proj' into one group, it matches none" in err
