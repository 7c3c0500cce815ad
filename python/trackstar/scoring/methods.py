"""The methods by name: which rows each scores, and how. docs/methods.md has the formulas and their sources."""

from dataclasses import dataclass

from trackstar.storage.store import Store


@dataclass(frozen=True)
class Gradients:
    """A method that compares rows of gradients, x, or whitened y = R^(-1/2) x.

    Attributes:
        corrected: whether x is divided by √V; None for what the store holds.
        output: what x is the gradient of; None for what the store holds.
        whitened: whether y is compared, not x.
        unit_norm: whether rows and queries are divided by their norms.
        mixed: whether R is mixed with the queries' own R_eval.
        weighted: whether a training example counts in proportion to 1 − p, what its probability leaves to learn.
    """

    corrected: bool | None
    output: str | None
    whitened: bool
    unit_norm: bool
    mixed: bool = False
    weighted: bool = False


GRADIENTS = {
    #                     corrected  output  whitened  unit_norm
    "dot": Gradients(False, None, False, False),
    "cosine": Gradients(False, None, False, True),
    "v-norm": Gradients(True, None, False, True),
    "r-norm": Gradients(False, None, True, True),
    "v-r-norm": Gradients(True, None, True, True),
    "trackstar": Gradients(None, None, True, True, mixed=True),
    "trak": Gradients(False, "margin", True, False, weighted=True),
    "tracin": Gradients(False, None, False, False),
    "logra": Gradients(False, None, True, False),
}
"""Methods that scan a store's rows."""

READERS = ("bm25", "dense")
"""Methods that read the examples' texts, and need no model."""

METHODS = (*GRADIENTS, "ekfac", *READERS)
"""All of them; EK-FAC runs the model over the examples again."""


def require_method(name: str) -> None:
    """Require a method of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}")


def fits(method: Gradients, store: Store) -> bool:
    """Whether a store holds the rows that a method scores."""
    corrected = store.identity["correction"] is not None
    return method.corrected in (None, corrected) and method.output in (None, store.output)


def require_rows(name: str, store: Store) -> None:
    """Require a store to hold the rows that the method scores.

    Raises:
        ValueError: it does not; says which rows those are, and what makes a store of them.
    """
    method = GRADIENTS[name]
    if fits(method, store):
        return
    if method.corrected:
        remedy = "build one with a correction"
    else:
        remedy = "companion_store() builds one from it"
    raise ValueError(
        f"method {name} needs a store of {wanted_rows(method, store)}, {store.path} holds {held_rows(store)}: {remedy}"
    )


def wanted_rows(method: Gradients, store: Store) -> str:
    """The rows that a method scores, in words."""
    kind = {True: "corrected ", False: "uncorrected ", None: ""}[method.corrected]
    return f"{kind}gradients of the {method.output or store.output}"


def held_rows(store: Store) -> str:
    """The rows that a store holds, in words."""
    return f"{'un' * (store.identity['correction'] is None)}corrected gradients of the {store.output}"
