"""Options and input files that commands have in common."""

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class CorrectionKind(StrEnum):
    """Forms of the optimizer correction."""

    none = "none"
    rank = "rank"
    exact = "exact"


class Dtype(StrEnum):
    """Dtypes of stored rows."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"
    int4 = "int4"
    sign = "sign"


class Output(StrEnum):
    """What a row can be the gradient of."""

    loss = "loss"
    margin = "margin"
    logit = "logit"


class MethodName(StrEnum):
    """Names of the methods, as in docs/methods.md."""

    dot = "dot"
    cosine = "cosine"
    v_norm = "v-norm"
    r_norm = "r-norm"
    v_r_norm = "v-r-norm"
    trackstar = "trackstar"
    trak = "trak"
    tracin = "tracin"
    logra = "logra"
    ekfac = "ekfac"
    bm25 = "bm25"
    dense = "dense"


class SketchKind(StrEnum):
    """Kinds of random projections: see SketchSpec."""

    rademacher = "rademacher"
    gaussian = "gaussian"
    countsketch = "countsketch"


class Also(StrEnum):
    """What can be captured besides attention and MLP matrices."""

    embeddings = "embeddings"
    lm_head = "lm_head"
    biases = "biases"
    norms = "norms"


class Wide(StrEnum):
    """Dtypes of a wider copy of the rows."""

    float32 = "float32"
    float16 = "float16"


ModelOption = Annotated[Path, typer.Option("--model", help="Folder of a transformers causal language model.")]
DataOption = Annotated[Path, typer.Option("--data", help='JSONL of {"text": …} or {"input_ids": …}.')]
StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
OptimizerOption = Annotated[
    Path | None,
    typer.Option(
        help="Saved optimizer state for the correction: a torch.save or safetensors file, an index of safetensors "
        "shards, a torch.distributed.checkpoint folder, or a Trainer or accelerate checkpoint."
    ),
]
CorrectionOption = Annotated[CorrectionKind, typer.Option(help="Optimizer correction V^(-1/2).")]
SketchOption = Annotated[
    int, typer.Option(help="p = q: a module's gradient becomes sketch × sketch numbers.")
]
KindOption = Annotated[
    SketchKind,
    typer.Option(
        help="Projections; countsketch makes the exact correction nearly free of the sketch's size."
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Dtype of the stored rows.")]
WideOption = Annotated[
    Wide | None, typer.Option(help="Dtype of a wider copy of int8, int4 or sign rows, for exact answers.")
]
ModulesOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help='What to capture, or after a "!" leave out; may be given often.'),
]
AlsoOption = Annotated[
    list[Also] | None,
    typer.Option(help="What to capture besides attention and MLP matrices; may be given often."),
]
BlocksOption = Annotated[
    str,
    typer.Option(help='"module", a number of layer blocks, or a JSON file of {pattern: group} for your own.'),
]


def read_jsonl(path: Path, option: str) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; blank lines do not count."""
    lines = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{option}: line {number} of {path} is not JSON: {error}") from None
    if not lines:
        raise ValueError(f"{option} must hold at least one line, {path} is empty")
    return lines


def read_grouping(path: Path) -> Any:
    """The blocks that a JSON file groups modules into."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--blocks: {path} is not JSON: {error}") from None


def make_spec(
    sketch: int,
    blocks: str,
    kind: SketchKind,
    seed: int = 0,
    modules: list[str] | None = None,
    also: list[Also] | None = None,
) -> Any:
    """The SketchSpec of these options."""
    from trackstar.gradients.spec import SketchSpec

    grouping = int(blocks) if blocks.isdigit() else blocks
    if blocks.endswith(".json"):
        grouping = read_grouping(Path(blocks))
    kinds = [word.value for word in also or ()]
    return SketchSpec(
        seed=seed, sketch=sketch, blocks=grouping, kind=kind.value, modules=modules or None, also=kinds
    )


def silence_transformers() -> None:
    """Have transformers say nothing, and show no bars, when it loads models."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def require_model(folder: Path) -> None:
    """Require a model's folder, and have transformers keep silent about it."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"--model must be a folder with a transformers model (config.json), got {folder}"
        )
    silence_transformers()


def load_model(folder: Path) -> tuple[Any, Any]:
    """The model, float32, and the tokenizer in ``folder``; nothing is downloaded."""
    require_model(folder)
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    return model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def parse_bytes(text: str, option: str) -> int:
    """The bytes that an amount such as 64MB or 2GB stands for: powers of 1000, as in what is printed."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    if found is None:
        raise typer.BadParameter(f"{option} must be an amount such as 64MB or 2GB, got {text!r}")
    return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))


def parse_range(text: str | None, option: str) -> tuple[int, int | None]:
    """(A, B) of "A:B"; A is 0 and B None, for the end, where they are left out."""
    found = re.fullmatch(r"(\d*):(\d*)", ":" if text is None else text)
    if found is None:
        raise typer.BadParameter(f"{option} must be A:B, got {text!r}")
    return int(found[1] or 0), int(found[2]) if found[2] else None


def parse_checkpoint(text: str, option: str) -> tuple[Path, Path, float]:
    """(STORE, MODEL, RATE) of "STORE:MODEL:RATE"."""
    store, first, rest = text.partition(":")
    model, second, rate = rest.rpartition(":")
    try:
        if not (store and first and model and second):
            raise ValueError
        return Path(store), Path(model), float(rate)
    except ValueError:
        raise typer.BadParameter(f"{option} must be STORE:MODEL:RATE, got {text!r}") from None


def parse_condition(text: str, option: str) -> tuple[str, str]:
    """(FIELD, PATTERN) of "FIELD=PATTERN"."""
    field, equals, pattern = text.partition("=")
    if not field or not equals:
        raise typer.BadParameter(f"{option} must be FIELD=PATTERN, got {text!r}")
    return field, pattern
