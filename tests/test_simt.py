"""The CUDA kernels on the simulated device, under sanitizers and other schedules; and mistakes that it must find."""

import shutil

import pytest
import torch
from cuda_device import ROOT, Program, build, cuda_runs
from test_scoring import check_mixed, check_topk, exact_scores, randn

import trackstar_kernels as tk
from trackstar_kernels import scoring


def check(program):
    """Several tiles and slices, survivors that are weeded out, more steps than stages, ties, both ops."""
    with cuda_runs(program, scoring.BACKENDS, multiprocessors=1):
        queries, rows = randn(3, 140), randn(700, 140, seed=1, dtype=torch.float16)
        rows[350:] = rows[:350]
        result = tk.score_topk(queries, rows, 9, backend="cuda")
        exact = exact_scores(queries, rows)
        check_topk(result, exact, 9, True, torch.full_like(exact, 1e-4))
        assert (result[1][:, 1::2] == result[1][:, :-1:2] + 350).all()
        # Scores that are all worse than those of rows of zeros, which fill the last tile.
        queries, rows = queries.abs(), -rows[:140].abs()
        exact = exact_scores(queries, rows)
        result = tk.score_topk(queries, rows, 140, backend="cuda")
        check_topk(result, exact, 140, True, torch.full_like(exact, 1e-3))
        check_mixed(randn(20, 2, 40), randn(150, 2, 40, seed=1), 0.9, k=5, backend="cuda")
        check_mixed(randn(3, 2, 40), randn(150, 2, 40, seed=1), 0.9, k=5, backend="cuda")


SANITIZERS = {
    "address and undefined behaviour": (
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ),
    "threads": ("-fsanitize=thread",),
}


@pytest.fixture(scope="module", params=SANITIZERS.values(), ids=SANITIZERS)
def sanitized(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("sanitized") / "driver", "-O0", "-g", *request.param)


def test_sanitizers(sanitized):
    check(Program(sanitized))


def test_sanitizers_in_random_order(sanitized):
    check(Program(sanitized, SIMT_SEED="1"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return build(tmp_path_factory.mktemp("plain") / "driver", "-O1")


@pytest.mark.parametrize("seed", range(3))
def test_random_order(plain, seed):
    check(Program(plain, SIMT_SEED=str(seed)))


# What a mistake replaces in which file, and the options that it is looked for with.
MISTAKES = {
    "no barrier before a step is used": (
        "scoring.cuh",
        "    __syncthreads();  // every",
        "    // every",
        (),
    ),
    "no wait for copies": (
        "scoring.cuh",
        "wait_for_copies<kDepth - 2>()",
        "wait_for_copies<kDepth - 1>()",
        (),
    ),
    "the step in use is overwritten": (
        "scoring.cuh",
        "copy_next(current == 0 ? kDepth - 1 : current - 1)",
        "copy_next(current)",
        (),
    ),
    "one row too many": (
        "scoring.cuh",
        "row[0] < rows.N, row[1] < rows.N}",
        "row[0] <= rows.N, row[1] <= rows.N}",
        (),
    ),
    "one tile too few": ("scoring.cuh", "at.tile >= tiles", "at.tile >= tiles - 1", ()),
    "a step's end from the next block": (
        "scoring.cuh",
        "rows.d - begin);",
        "Format<type>::kDepth);",
        ("-fsanitize=address",),
    ),
    "ties to the larger index": ("survivors.cuh", "| ~position", "| position", ()),
    "no barrier before weeding": (
        "survivors.cuh",
        "    __syncthreads();\n    for",
        "    for",
        ("-fsanitize=thread",),
    ),
    "weeding keeps one less": ("survivors.cuh", "key >= lowest", "key > lowest", ()),
    "room for less than a tile": (
        "survivors.cuh",
        "capacity - kTileRows",
        "capacity",
        ("-fsanitize=address",),
    ),
    "places read and written at once": (
        "survivors.cuh",
        "      __syncwarp();  // the",
        "      // the",
        ("-fsanitize=thread",),
    ),
    "counting before bins are empty": (
        "survivors.cuh",
        "      bins[lane] = 0;\n      __syncwarp();",
        "      bins[lane] = 0;",
        ("-fsanitize=thread",),
    ),
    "a lane leaves before a vote": (
        "survivors.cuh",
        "    if (all == 0) return;",
        "    if (!passes) return;",
        (),
    ),
    "queries' products cut short": (
        "tile.cuh",
        "int plane = Format<type>::kPlanes - 1",
        "int plane = Format<type>::kPlanes - 2",
        (),
    ),
    "lanes' sums in another order": ("tile.cuh", "own[2], own[1]", "own[1], own[2]", ()),
    "norms counted twice": ("scoring.cuh", "int b = threadIdx.x % 4", "int b = threadIdx.x % 2", ()),
}


# Every run looks for one of each kind.
USUAL = {
    "no barrier before a step is used",
    "no wait for copies",
    "one row too many",
    "a step's end from the next block",
    "ties to the larger index",
    "no barrier before weeding",
    "places read and written at once",
    "a lane leaves before a vote",
}


def cases():
    assert set(MISTAKES) >= USUAL
    for name, mistake in MISTAKES.items():
        yield pytest.param(*mistake, id=name, marks=[] if name in USUAL else [pytest.mark.slow])


@pytest.mark.parametrize(("file", "right", "wrong", "options"), list(cases()))
def test_mistakes_are_found(tmp_path, file, right, wrong, options):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / file
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    program = Program(build(tmp_path / "driver", "-O0", *options, csrc=tmp_path / "csrc"))
    with pytest.raises((AssertionError, RuntimeError)):
        check(program)
