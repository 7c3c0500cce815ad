"""The C++ entry points on four threads under ThreadSanitizer: no races, and the bits of one thread."""

import subprocess
from pathlib import Path

import pytest
import torch
from sanitized_driver import KERNELS, LEVELS, THREADS, SanitizedDriver
from test_gradient import FORMS, Case
from test_other_processors import ROW_TYPES
from test_sanitized import NARROW, normal, prepared, stored

from trackstar_kernels import _C
from trackstar_kernels._codes import code_size

pytestmark = pytest.mark.slow

N, L, d, k = 2500, 2, 33, 7
RACE = 66
"""What ThreadSanitizer ends a process with."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return SanitizedDriver(tmp_path_factory.mktemp("races"), THREADS)


@pytest.fixture(params=["baseline", _C.available_isas()[-1]])
def level(request):
    return list(LEVELS).index(request.param)


def assert_same_on_four(run, results):
    """``run(threads, results)`` gives on four threads what it gives on one."""
    alone = [torch.empty_like(result) for result in results]
    run(1, alone)
    run(4, results)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, alone, strict=True))


def found(Q):
    return [torch.empty(Q, k), torch.empty(Q, k, dtype=torch.int64)]


@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("Q", [3, 20])
def test_scans(driver, level, dtype, Q):
    queries, rows = normal(Q, L, d, seed=0), normal(N, L, d, seed=1)
    codes, scales, norms = stored(rows, dtype)
    sizes = (Q, k, N, L, d, ROW_TYPES.index(dtype))
    arrays = (queries, codes, scales)

    def run(*op, results):
        driver.run("isa", level, "threads", *op, results=results)

    assert_same_on_four(
        lambda threads, results: run(threads, "score_topk", *sizes, 1, *arrays, results=results), found(Q)
    )
    if dtype in NARROW:
        # How many rows are looked at depends on the threads.
        again = (torch.empty(Q, dtype=torch.int64),)
        wider = (rows, norms)
        assert_same_on_four(
            lambda threads, results: run(
                *(threads, "rescored_topk", *sizes, 0, 1, *arrays, *wider), results=[*results, *again]
            ),
            found(Q),
        )


def test_codes_of_int4(driver, level):
    unit = normal(N, L, d, seed=0).div(5).clamp(-1, 1)
    codes = torch.empty(N, L, code_size(d, torch.uint8), dtype=torch.uint8)
    assert_same_on_four(
        lambda threads, results: driver.run(
            *("isa", level, "threads", threads, "pack_best_codes", N * L, d, unit), results=results
        ),
        [codes],
    )


@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("Q", [3, 40])
def test_tasks(driver, level, dtype, Q):
    queries, rows = normal(Q, L, d, seed=0), normal(N, L, d, seed=1)
    codes, scales, norms = stored(rows, dtype)
    hessian, task = prepared(queries, 0.5)
    sizes, kind = (N, L, d, hessian.rank), ROW_TYPES.index(dtype)
    form = (hessian.base, hessian.sign)
    assert_same_on_four(
        lambda threads, results: driver.run(
            *("isa", level, "threads", threads, "mixed_topk", Q, k, *sizes, kind, 1, *form, 0.0),
            *(*task, codes, scales, norms),
            results=results,
        ),
        [*found(Q), torch.empty(N, dtype=torch.bool)],
    )
    if dtype in NARROW:
        assert_same_on_four(
            lambda threads, results: driver.run(
                *("isa", level, "threads", threads, "mixed_parts", Q, *sizes, kind, *form),
                *(*task, codes, scales),
                results=results,
            ),
            [torch.empty(N, Q), *(torch.empty(N, dtype=torch.float64) for _ in range(2))],
        )


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(driver, level, form, dtype):
    case = Case([300, 0, 31, 1, 1030, 7], (193, 97, 17, 7), **form, dtype=dtype)
    one, four = (driver.project_gradients(case, "isa", level, "threads", threads) for threads in (1, 4))
    assert torch.equal(one, four)


def test_a_race_is_found(driver, tmp_path):
    """All threads in the working memory of one."""
    source = (KERNELS / "scan.cpp").read_text()
    assert "scans[thread_index()]->run" in source
    (tmp_path / "scan.cpp").write_text(source.replace("scans[thread_index()]->run", "scans[0]->run"))
    racing = object.__new__(SanitizedDriver)
    vars(racing).update(vars(driver), folder=tmp_path)
    racing.objects = [object_ for object_ in driver.objects if Path(object_).stem != "scan"]
    racing.objects.append(racing.compile(tmp_path / "scan.cpp", "scan"))
    racing.link()
    arrays = normal(3, L, d, seed=0), normal(N, L, d, seed=1), None
    with pytest.raises(subprocess.CalledProcessError) as error:
        racing.run("threads", 4, "score_topk", 3, k, N, L, d, 0, 1, *arrays, results=found(3))
    assert error.value.returncode == RACE
