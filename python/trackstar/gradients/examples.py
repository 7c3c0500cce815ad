"""Text and token ids as the model reads them."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

IGNORED = -100
"""Label of a token that the loss leaves out, as in torch and transformers."""

TOKENIZED_TOGETHER = 1000
"""Texts that a tokenizer gets at a time."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One example as the model reads it.

    Attributes:
        id: the example's own "id", or its position in the corpus.
        text: the text it came from; decoded ids where only those were given and there is a tokenizer, else "".
        tokens: (T,) int32.
        labels: (T,) int32, a token's own id where its prediction counts towards the loss, else −100. As in
            transformers, the label at position t is predicted from the tokens before t, so the first one never counts.
        metadata: what else is known of it, a JSON object, "" where there is nothing.
    """

    id: str
    text: str
    tokens: np.ndarray
    labels: np.ndarray
    metadata: str = ""

    def __len__(self) -> int:
        return len(self.tokens)

    def beginning(self, tokens: int) -> "Encoded":
        """The example, cut to its first tokens."""
        return dataclasses.replace(self, tokens=self.tokens[:tokens], labels=self.labels[:tokens])


@dataclasses.dataclass(frozen=True)
class EncodedQuery(Encoded):
    """A query: the labels cover its target alone.

    Of several targets, the tokens and labels are those of the first; :attr:`sequences` has all.

    Attributes:
        prompt: what the model was given.
        target: what it said, as shown to people.
        alternatives: other targets that count as said just as well.
        rather_than: targets that were not said, with which those are compared.
    """

    prompt: str = ""
    target: str = ""
    alternatives: tuple[Encoded, ...] = ()
    rather_than: tuple[Encoded, ...] = ()

    @property
    def sequences(self) -> tuple[Encoded, ...]:
        """What the model reads: the target, the alternatives, and what was not said."""
        return (self, *self.alternatives, *self.rather_than)


def encode_examples(
    examples: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    max_tokens: int | None = None,
    first: int = 0,
) -> list[Encoded]:
    """Training examples: {"text": …} or {"input_ids": …, "labels": … (optional)}.

    Each may have an "id" (default: its position, counted from ``first``) and "metadata", a mapping of JSON values.
    Examples longer than ``max_tokens`` are cut to it.

    Raises:
        ValueError: there are none, or one has neither field, or its labels or metadata do not fit.
        TypeError: one is not a mapping.
    """
    given = list(examples)
    if not given:
        raise ValueError("examples must hold at least one example, got none")
    for i, example in enumerate(given):
        if not isinstance(example, Mapping):
            raise TypeError(
                f'examples[{i}] must be a mapping with "text" or "input_ids", got {type(example).__name__}'
            )
        if "input_ids" not in example and not isinstance(example.get("text"), str):
            raise ValueError(
                f'examples[{i}] must have "text" (a string) or "input_ids", got the fields {sorted(example)}'
            )
    texts = [example["text"] for example in given if "input_ids" not in example]
    if texts and tokenizer is None:
        raise ValueError("tokenizer must be given to read examples as text, got None")
    ids = _tokenized(texts, tokenizer)
    encoded = []
    for i, example in enumerate(given):
        tokens = _tokens(example["input_ids"] if "input_ids" in example else next(ids))
        labels = _labels(example.get("labels"), tokens, f"examples[{i}]")
        text = example.get("text")
        if text is None:
            text = tokenizer.decode(tokens.tolist()) if tokenizer is not None else ""
        metadata = _metadata(example.get("metadata"), f"examples[{i}]")
        name = str(example.get("id", first + i))
        encoded.append(Encoded(name, text, tokens[:max_tokens], labels[:max_tokens], metadata))
    return encoded


def encode_queries(queries: Iterable[Mapping[str, Any]], tokenizer: Any) -> list[EncodedQuery]:
    """Queries: what the model said after a prompt, each with an optional "id".

    - {"prompt": …, "target": …}, or {"input_ids": …, "labels": …}.
    - {"prompt": …, "targets": […]}: any of several targets.
    - {"completions": [{"prompt": …, "target": …}, …]}: several prompts and targets that follow each other in one text;
      the loss is of all targets.
    - Each of these with "rather_than": a target, or a list of them, which the model did not say.

    A target is tokenized on its own and follows the prompt's tokens. In the place of a string, any of several targets
    and what was not said may be a query of their own, without the prompt.

    Raises:
        ValueError: there are none, or one lacks a field, or a target has no token that the loss counts.
        TypeError: one is not a mapping.
    """
    given = list(queries)
    if not given:
        raise ValueError("queries must hold at least one query, got none")
    return [_encode_query(query, i, tokenizer) for i, query in enumerate(given)]


def _encode_query(query: Mapping[str, Any], i: int, tokenizer: Any) -> EncodedQuery:
    where = f"queries[{i}]"
    if not isinstance(query, Mapping):
        raise TypeError(f"{where} must be a mapping, got {type(query).__name__}")
    name = str(query.get("id", i))
    prompt = query.get("prompt")
    if "targets" in query:
        wanted = _several(query["targets"], f"{where}: targets")
    else:
        wanted = [query]
    others = _several(query["rather_than"], f"{where}: rather_than") if "rather_than" in query else []
    said, unsaid = (
        [
            _answer(t if isinstance(t, Mapping) else {"prompt": prompt, "target": t}, name, where, tokenizer)
            for t in side
        ]
        for side in (wanted, others)
    )
    target = " | ".join(answer.target.strip() for answer in said) if len(said) > 1 else said[0].target
    if unsaid:
        target = f"{target}, rather than {' | '.join(answer.target.strip() for answer in unsaid)}"
    return dataclasses.replace(
        said[0],
        text=said[0].prompt + "".join(answer.target for answer in said),
        target=target,
        alternatives=tuple(said[1:]),
        rather_than=tuple(unsaid),
    )


def _several(targets: Any, where: str) -> list[Any]:
    found = [targets] if isinstance(targets, str | Mapping) else targets
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(f"{where} must be a target or a list of at least one, got {targets!r}")
    return list(found)


def _answer(given: Mapping[str, Any], name: str, where: str, tokenizer: Any) -> EncodedQuery:
    """One sequence, with the loss of its target or targets."""
    if "input_ids" in given and "labels" in given:
        tokens = _tokens(given["input_ids"])
        labels = _labels(given["labels"], tokens, where)
        counted = labels != IGNORED
        prompt, target = (
            "" if tokenizer is None else tokenizer.decode(part.tolist())
            for part in (tokens[~counted], tokens[counted])
        )
    else:
        pairs = given.get("completions", [given])
        texts = [] if not isinstance(pairs, list) else [_prompt_and_target(pair) for pair in pairs]
        if not texts or None in texts:
            raise ValueError(
                f'{where} must have "prompt" and "target" (strings), or "input_ids" and "labels"; '
                f"got the fields {sorted(given)}"
            )
        if tokenizer is None:
            raise ValueError("tokenizer must be given to read queries as text, got None")
        flat = [text for pair in texts for text in pair or ()]
        parts = [_tokens(tokenizer(flat[0])["input_ids"])]
        parts += [_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in flat[1:]]
        tokens = np.concatenate(parts)
        labels = np.concatenate(
            [part if i % 2 else np.full_like(part, IGNORED) for i, part in enumerate(parts)]
        )
        prompt, target = "".join(flat[:-1]), flat[-1]
    if not (labels[1:] != IGNORED).any():
        raise ValueError(
            f"{where} must have a target of at least one token that follows another, got {target!r}"
        )
    return EncodedQuery(name, prompt + target, tokens, labels, prompt=prompt, target=target)


def _prompt_and_target(pair: Any) -> tuple[str, str] | None:
    if not isinstance(pair, Mapping):
        return None
    prompt, target = pair.get("prompt"), pair.get("target")
    return (prompt, target) if isinstance(prompt, str) and isinstance(target, str) else None


def check_queries(queries: Sequence[EncodedQuery], vocabulary: int) -> None:
    """Require every token id of the queries to be one of the model's: see :func:`check_vocabulary`."""
    for i, query in enumerate(queries):
        for sequence in query.sequences:
            _check_ids(sequence, vocabulary, f"queries[{i}]")


def encode_task(task: Iterable[Mapping[str, Any]], tokenizer: Any) -> list[EncodedQuery]:
    """Queries, as for :func:`encode_queries`, that are to make R_eval of others.

    Raises:
        ValueError: there are fewer than two, or one is no query.
        TypeError: one is not a mapping.
    """
    given = list(task)
    if len(given) < 2:
        raise ValueError(
            f"task must hold at least two queries, got {len(given)}: R_eval would be of rank {len(given)}"
        )
    try:
        return encode_queries(given, tokenizer)
    except (ValueError, TypeError) as error:
        raise type(error)(f"task: {error}") from None


def check_vocabulary(encoded: Sequence[Encoded], vocabulary: int, name: str) -> None:
    """Require every token id to be one of the model's.

    Raises:
        ValueError: an id is out of range, as with another model's tokenizer.
    """
    for i, example in enumerate(encoded):
        _check_ids(example, vocabulary, f"{name}[{i}]")


def _check_ids(example: Encoded, vocabulary: int, name: str) -> None:
    if len(example) and not (example.tokens.min() >= 0 and example.tokens.max() < vocabulary):
        raise ValueError(
            f"{name} must hold token ids from 0 to {vocabulary - 1} (the model's vocabulary), got "
            f"{example.tokens.min()} to {example.tokens.max()}: is it another model's tokenizer?"
        )


def length_batches(lengths: Sequence[int], budget: int, *, padded: bool = True) -> list[list[int]]:
    """Positions in batches of similar length: each holds at most ``budget`` tokens (or one example).

    A function of the lengths alone: shortest first, ties in order. ``padded`` counts an example as long as the
    longest of its batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batches: list[list[int]] = []
    tokens = 0
    for i in order:
        # Sorted by length, so the newcomer sets the padded length of the batch.
        tokens = (len(batches[-1]) + 1) * lengths[i] if batches and padded else tokens + lengths[i]
        if batches and tokens <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            tokens = lengths[i]
    return batches


def _tokenized(texts: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each text, some texts at a time: a tokenizer's results take over a hundred bytes a token."""
    for start in range(0, len(texts), TOKENIZED_TOGETHER):
        yield from tokenizer(texts[start : start + TOKENIZED_TOGETHER])["input_ids"]


def _tokens(ids: Any) -> np.ndarray:
    tokens = np.asarray(ids, dtype=np.int32)
    if tokens.ndim != 1:
        raise ValueError(f"input_ids must be one sequence of token ids, got shape {tokens.shape}")
    return tokens


def _labels(labels: Any, tokens: np.ndarray, name: str) -> np.ndarray:
    if labels is None:
        return tokens
    array = np.asarray(labels, dtype=np.int32)
    if array.shape != tokens.shape:
        raise ValueError(
            f"{name}: labels must be as long as input_ids, {len(tokens)} tokens; got shape {array.shape}"
        )
    return array


def _metadata(metadata: Any, name: str) -> str:
    if metadata is None:
        return ""
    if not isinstance(metadata, Mapping):
        raise ValueError(f"{name}: metadata must be a mapping, got {type(metadata).__name__}")
    try:
        return json.dumps(dict(metadata), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: metadata must hold JSON values alone: {error}") from None
