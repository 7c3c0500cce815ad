"""Which training examples are worth a gradient: those that share rare tokens with the query."""

from collections.abc import Sequence

import numpy as np

from trackstar.gradients.examples import Encoded


def candidates_of(queries: Sequence[Encoded], examples: Sequence[Encoded], count: int) -> list[np.ndarray]:
    """Positions of the ``count`` examples that match each query best by TF-IDF, ascending; ties to the smaller.

    The measure is BM25 over token ids, which weighs a shared token by its rarity, and fades its repetitions and long
    examples. Unlike words, tokens need no text and no language.

    Raises:
        ImportError: bm25s is not installed.

    Source: Grosse et al., arXiv 2308.03296, section 3.2 (TF-IDF filtering).
    """
    try:
        import bm25s
    except ImportError:
        raise ImportError(
            f"choosing {count:,} candidates of {len(examples):,} examples needs bm25s: pip install 'trackstar[bm25]', "
            "or candidates=None to score every example"
        ) from None
    index = bm25s.BM25()
    index.index([_terms(example) for example in examples], show_progress=False)
    found = []
    for query in queries:
        scores = index.get_scores(_terms(query))
        found.append(np.sort(np.argsort(-scores, kind="stable")[:count]))
    return found


def _terms(example: Encoded) -> list[str]:
    return [str(token) for token in example.tokens.tolist()]
