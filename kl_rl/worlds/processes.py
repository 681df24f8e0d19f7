"""Base processes of world files; every kind compiles to the probabilities of a hidden Markov process."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kl_rl.exact.hidden_markov import HiddenMarkov
from kl_rl.worlds.schema import kinds
from kl_rl.worlds.validation import Field, check_keys, distribution, integer, items, stochastic_table

__all__ = ["Probabilities", "impossible_token", "parse_base", "to_hidden_markov"]

MAX_STATES = 4096


class Probabilities(NamedTuple):
    """A hidden Markov process as float64 probabilities on the host."""

    initial: np.ndarray  # [S]
    transition: np.ndarray  # [S, S]
    emission: np.ndarray  # [S, V]


def parse_base(spec: object, field: Field) -> Probabilities:
    """Check the "base" part of a world and compile it.

    Args:
      spec: the parsed JSON value.
      field: its place, for messages.

    Returns:
      The process; its vocabulary is the width of the emission table.

    Raises:
      BadWorld: naming the field.
    """
    known = kinds("base")
    if not isinstance(spec, dict) or "kind" not in spec:
        field.fail(f'must be an object with a "kind": one of {", ".join(known)}')
    kind = spec["kind"]
    if not isinstance(kind, str) or kind not in known:
        (field / "kind").fail(f"must be one of {', '.join(known)}, got {kind!r}")
    return _PARSERS[kind](check_keys(spec, known[kind], field), field)


def _markov(spec: dict[str, Any], field: Field) -> Probabilities:
    initial = distribution(spec["initial"], field / "initial")
    size = len(initial)
    transition = stochastic_table(spec["transition"], field / "transition", (size, size))
    return Probabilities(initial, transition, np.eye(size))


def _hmm(spec: dict[str, Any], field: Field) -> Probabilities:
    initial = distribution(spec["initial"], field / "initial")
    size = len(initial)
    transition = stochastic_table(spec["transition"], field / "transition", (size, size))
    return Probabilities(
        initial, transition, stochastic_table(spec["emission"], field / "emission", (size, None))
    )


def _ngram(spec: dict[str, Any], field: Field) -> Probabilities:
    order = integer(spec["order"], field / "order", low=1)
    listed = items(spec["tables"], field / "tables")
    if len(listed) != order:
        (field / "tables").fail(
            f"must have {order} tables, one for each context length below the order, got {len(listed)}"
        )
    vocab = len(distribution(listed[0], (field / "tables")[0]))
    tables = [stochastic_table(t, (field / "tables")[k], (vocab,) * (k + 1)) for k, t in enumerate(listed)]
    if order == 1:
        return Probabilities(np.ones(1), np.ones((1, 1)), tables[0][None])
    return _context_chain(tables, vocab, field)


def _context_chain(tables: list[np.ndarray], vocab: int, field: Field) -> Probabilities:
    """Hidden states are the last min(t, n-1) tokens, the current one included; each emits its last token."""
    order = len(tables)
    size = sum(vocab**k for k in range(1, order))
    if size > MAX_STATES:
        (field / "order").fail(f"needs {size} states, above {MAX_STATES}; lower the order or the vocabulary")
    contexts = [c for k in range(1, order) for c in np.ndindex(*(vocab,) * k)]
    index = {context: i for i, context in enumerate(contexts)}
    initial = np.zeros(size)
    initial[:vocab] = tables[0]
    transition, emission = np.zeros((size, size)), np.zeros((size, vocab))
    for context, i in index.items():
        emission[i, context[-1]] = 1.0
        for token, probability in enumerate(tables[len(context)][context]):
            transition[i, index[(*context, token)[-(order - 1) :]]] += probability
    return Probabilities(initial, transition, emission)


_PARSERS = {"markov": _markov, "hmm": _hmm, "ngram": _ngram}


def to_hidden_markov(process: Probabilities) -> HiddenMarkov:
    """The process in log-probabilities (nats), in the default float type."""
    with np.errstate(divide="ignore"):
        return HiddenMarkov(*(jnp.asarray(np.log(table)) for table in process))


def impossible_token(process: Probabilities, tokens: list[int]) -> int | None:
    """Position of the first token that the process cannot emit after those before it, or None."""
    belief = process.initial
    for position, token in enumerate(tokens):
        seen = belief * process.emission[:, token]
        total = seen.sum()
        if total == 0:
            return position
        belief = (seen / total) @ process.transition
    return None
