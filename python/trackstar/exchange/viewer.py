"""Reading results from the JSONL of the paper's viewer, which :meth:`.Result.to_jsonl` writes."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trackstar.gradients.examples import EncodedQuery
from trackstar.scoring.result import Result

METHOD = "viewer file"
"""The method of a result that was read: the format does not say which it was."""


class Passages:
    """Passages that a file of results shows, as a corpus: each once, in the order in which they first appear."""

    def __init__(self) -> None:
        self._positions: dict[tuple[str, str], int] = {}
        self._passages: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self._passages)

    def text(self, index: int) -> str:
        """The text of passage ``index``."""
        return self._passages[index][1]

    def id(self, index: int) -> str:
        """The id of passage ``index``."""
        return self._passages[index][0]

    def tokens(self, index: int) -> np.ndarray:
        """No tokens (0,) int32: the file has none of passage ``index``."""
        return np.zeros(0, np.int32)

    def add(self, name: str, text: str) -> int:
        """The passage's index."""
        index = self._positions.setdefault((name, text), len(self._passages))
        if index == len(self._passages):
            self._passages.append((name, text))
        return index


def read_jsonl_results(path: str | os.PathLike[str]) -> Result:
    """The results that a file holds.

    ``result.corpus`` has the passages that the file shows, and ``result.indices`` are places in it. The opponents, if
    there are any, are ``result.opponents``. λ and the method are not in the format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no results, or a line is not as the format says (which one, and why).
    """
    path = Path(path)
    corpus, queries = Passages(), []
    found: dict[str, list[tuple[list[float], list[int]]]] = {"proponent": [], "opponent": []}
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                queries.append(_query(line))
                for kind in found:
                    if kind == "proponent" or f"{kind}s" in line:
                        found[kind].append(_passages(line, kind, corpus))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                reason = f"it has no field {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(f"line {number} of {path} is no result: {reason}") from None
    if not queries:
        raise ValueError(f"{path} must hold at least one result, it is empty")
    results = {}
    for kind, lines in found.items():
        counts = sorted({len(scores) for scores, _ in lines})
        if lines and (len(lines) != len(queries) or len(counts) > 1):
            raise ValueError(f"every line of {path} must have as many {kind}s as the others, got {counts}")
        if lines:
            scores, indices = (torch.tensor(part) for part in zip(*lines, strict=True))
            results[kind] = Result(
                scores.float(), indices.long(), queries, corpus, method=METHOD, largest=kind == "proponent"
            )
    return dataclasses.replace(results["proponent"], opponents=results.get("opponent"))


def _query(line: Any) -> EncodedQuery:
    if not isinstance(line, dict):
        raise TypeError("it is not a JSON object")
    prompt, target = _string(line["inputs_plaintext"]), _string(line["targets_plaintext"])
    nothing = np.zeros(0, np.int32)
    return EncodedQuery(
        str(line["example_id"]), prompt + target, nothing, nothing, prompt=prompt, target=target
    )


def _passages(line: dict[str, Any], kind: str, corpus: Passages) -> tuple[list[float], list[int]]:
    texts, names, scores = (line[f"{kind}{end}"] for end in ("s", "_ids", "_scores"))
    if not len(texts) == len(names) == len(scores):
        raise ValueError(f"{len(texts)} {kind}s with {len(names)} ids and {len(scores)} scores")
    indices = [corpus.add(str(name), _string(text)) for name, text in zip(names, texts, strict=True)]
    return [float(score) for score in scores], indices


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value
