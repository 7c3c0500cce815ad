"""_C, whose arrays are addresses, called with what does not fit: test_hostile_arguments.py runs this by itself."""

import pytest
import torch

from trackstar_kernels import _C

NUMBERS = torch.zeros(256, dtype=torch.int64)
"""More than any call here reads or writes."""

HERE = NUMBERS.data_ptr()
OFFSETS = torch.tensor([0, 2, 3])
ROWS = {"values": HERE, "type": "float32", "stride": 8, "scales": 0, "N": 5, "L": 2, "d": 4}
TOP = {"Q": 3, "k": 2, "largest": True, "scores": HERE, "positions": HERE, "reached": 0}
QUERIES = {"values": HERE, "Q": 3, "L": 2, "d": 4, "type": "float32"}
TASK = {"Q": 3, "L": 2, "d": 4, "rank": 3, "base": 1.0, "sign": -0.5, "trusted": 0.0}
GRADIENTS = {"batch": 2, "in_features": 4, "out_features": 3, "rank": 1, "q": 2, "p": 2, "element": "float32"}
GRADIENTS |= {"activations": HERE, "output_grads": HERE, "offsets": OFFSETS.data_ptr(), "left": HERE}
GRADIENTS |= {"right": HERE, "scale": HERE, "out": HERE, "threads": 1}


def rows(**changes):
    return _C.Rows(**ROWS | changes)


def codes(**changes):
    return rows(type="int8", scales=HERE, **changes)


def top(**changes):
    return _C.TopK(**TOP | changes)


def task(blocks=(0, 1), weighted=True):
    made = _C.Task(**TASK)
    for b in blocks:
        made.set_block(b, HERE, HERE)
    if weighted:
        made.set_weights(HERE)
    return made


FOUND = {"scores": HERE, "positions": HERE, "k": 2}
MERGED = {"parts": [_C.Found(**FOUND)], "top": top()}
SCORED = {"queries": HERE, "rows": rows(), "tops": [top()], "threads": 1}
PACKED = SCORED | {"queries": _C.Queries(**QUERIES)}
RESCORED = {"queries": HERE, "codes": codes(), "wider": rows(), "squared_norms": HERE, "tops": [top()]}
RESCORED |= {"rescored": HERE, "threads": 1}
MIXED = {
    "task": task(),
    "squared_norms": HERE,
    "rows": rows(),
    "tops": [top()],
    "doubtful": HERE,
    "threads": 1,
}
PARTS = {"task": task(), "rows": codes(), "numerators": HERE, "squares": HERE, "inner": HERE, "threads": 1}

MISTAKES = [
    *(
        (_C.Rows, ROWS, name, value)
        for name, values in {
            "values": [0, -1, None, NUMBERS],
            "type": ["float64", "", 3],
            "stride": [-1, 2**60],
            "N": [0, -1, 2**32, 2**70],
            "L": [0, -1, 2**62],
            "d": [0, -1, 2**47, 2**62],
        }.items()
        for value in values
    ),
    *((_C.TopK, TOP, name, value) for name in ("Q", "k") for value in (0, -1, 2**48, 2**70)),
    *((_C.TopK, TOP, name, 0) for name in ("scores", "positions")),
    *((_C.Task, TASK, name, value) for name in ("Q", "L", "d", "rank") for value in (0, -1, 2**47, 2**62)),
    *(
        (call, valid, name, value)
        for call, valid in (
            (_C.score_topk, SCORED),
            (_C.score_queries, PACKED),
            (_C.rescored_topk, RESCORED),
            (_C.mixed_topk, MIXED),
        )
        for name, values in {
            "tops": [[], [top(), top(Q=2)], [top(k=6)], None],
            "threads": [0, -1, 10**6, 2**40],
        }.items()
        for value in values
    ),
    *((_C.Found, FOUND, name, value) for name in FOUND for value in (0, -1)),
    *(
        (_C.merge_topk, MERGED, "parts", value)
        for value in ([], [_C.Found(**FOUND | {"k": 1})], None, [None])
    ),
    (_C.score_topk, SCORED, "queries", 0),
    *((_C.Queries, QUERIES, name, value) for name in ("Q", "L", "d") for value in (0, -1, 2**47, 2**62)),
    (_C.Queries, QUERIES, "values", 0),
    *((_C.Queries, QUERIES, "type", value) for value in ("float64", "int8", "", 3)),
    *(
        (_C.score_queries, PACKED, "rows", other)
        for other in (codes(), rows(type="float16"), rows(d=3), rows(L=1))
    ),
    (_C.score_queries, PACKED, "tops", [top(Q=2)]),
    *((_C.rescored_topk, RESCORED, name, 0) for name in ("queries", "squared_norms", "rescored")),
    (_C.rescored_topk, RESCORED, "codes", rows()),
    *((_C.rescored_topk, RESCORED, "wider", other) for other in (codes(), rows(N=4), rows(d=3))),
    *((_C.mixed_topk, MIXED, name, 0) for name in ("squared_norms", "doubtful")),
    *((_C.mixed_parts, PARTS, name, 0) for name in ("numerators", "squares", "inner", "threads")),
    *(
        (call, valid, "task", other)
        for call, valid in ((_C.mixed_topk, MIXED), (_C.mixed_parts, PARTS))
        for other in (task(weighted=False), task(blocks=[1]), task(blocks=[]))
    ),
    *((_C.mixed_topk, MIXED, "rows", other) for other in (rows(d=3), rows(L=1))),
    (_C.mixed_topk, MIXED, "tops", [top(Q=2)]),
    (_C.mixed_parts, PARTS, "rows", rows()),
    *(
        (task().set_block, {"b": 0, "factors": HERE, "combine": HERE}, name, value)
        for name, value in (("b", -1), ("b", 2), ("b", 2**63), ("factors", 0), ("combine", 0))
    ),
    (task().set_weights, {"weights": HERE}, "weights", 0),
    *(
        (_C.project_gradients, GRADIENTS, name, value)
        for name in ("batch", "in_features", "out_features", "rank", "q", "p")
        for value in (-1, 2**62)
    ),
    *(
        (_C.project_gradients, GRADIENTS, name, 0)
        for name in ("activations", "output_grads", "offsets", "left", "right", "out", "threads")
    ),
    (_C.project_gradients, GRADIENTS, "element", "float64"),
    *(
        (_C.project_gradients, GRADIENTS, "offsets", offsets)
        for offsets in (torch.tensor([1, 2, 3]), torch.tensor([0, 3, 2]), torch.tensor([0, -1, 3]))
    ),
]


@pytest.mark.parametrize(
    ("call", "valid"),
    [
        (_C.Rows, ROWS),
        (_C.TopK, TOP),
        (_C.Task, TASK),
        (_C.Queries, QUERIES),
        (_C.Found, FOUND),
        (_C.merge_topk, MERGED),
        (_C.score_topk, SCORED),
        (_C.score_queries, PACKED),
        (_C.rescored_topk, RESCORED),
        (_C.mixed_topk, MIXED),
        (_C.mixed_parts, PARTS),
        (_C.project_gradients, GRADIENTS),
    ],
)
def test_what_the_mistakes_are_made_in_is_sound(call, valid):
    call(**valid)


@pytest.mark.parametrize(("call", "valid", "name", "value"), MISTAKES)
def test_sizes_that_contradict_each_other(call, valid, name, value):
    """Nothing is read or written before an error says what does not fit."""
    value = value.data_ptr() if name == "offsets" and isinstance(value, torch.Tensor) else value
    NUMBERS.fill_(7)
    with pytest.raises((ValueError, TypeError)):
        call(**valid | {name: value})
    assert (NUMBERS == 7).all()
