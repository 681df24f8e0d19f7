"""A world: a base process whose every conditional is known, and a reward, from a JSON file or a dict."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kl_rl.core.policy import Policy
from kl_rl.exact.automaton import Automaton, automaton_reward
from kl_rl.exact.hidden_markov import HiddenMarkov, hidden_markov_policy
from kl_rl.worlds.processes import Probabilities, impossible_token, parse_base, to_hidden_markov
from kl_rl.worlds.rewards import Table, parse_reward, to_automaton
from kl_rl.worlds.schema import MAX_HORIZON, schema
from kl_rl.worlds.validation import BadWorld, Field, check_keys, integer, items, token_list

__all__ = ["BadWorld", "World", "load_world", "parse_world"]


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """A base process, a reward automaton, a horizon and prompts.

    Attributes:
      name: label for reports.
      process: the base as a hidden Markov process, log-probabilities in nats.
      automaton: the reward.
      vocab: V.
      horizon: T, the largest number of completion tokens.
      end: end token, or None if all completions have T tokens.
      prompts: int32; column 0 and the left padding hold the begin mark, id V; [P, L].
      spec: the plain dict the world was made from; `parse_world(world.spec)` is the same world.
    """

    name: str
    process: HiddenMarkov
    automaton: Automaton
    vocab: int
    horizon: int
    end: int | None
    prompts: np.ndarray
    spec: dict[str, Any]

    @property
    def base(self) -> Policy:
        """The base process as a policy: exact next-token log-probabilities by filtering."""
        return hidden_markov_policy(self.process)

    @property
    def num_strings(self) -> int:
        """V ** T, the size of an enumeration (strings that stop early are among them)."""
        return self.vocab**self.horizon

    def reward(self, prompt: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Score of completions, in reward units; [..., L], [..., T], [..., T] -> [...]."""
        return automaton_reward(self.automaton, prompt, tokens, mask)


def parse_world(spec: object, where: str = "world") -> World:
    """Check a world given as a dict and compile it.

    Args:
      spec: see `kl_rl.worlds.schema()`.
      where: file name or label that messages begin with; also the default name.

    Returns:
      The world, arrays in the default float type (float64 if x64 is enabled before the call).

    Raises:
      BadWorld: one message that names the field and says what to do.
    """
    root = Field(where)
    fields = check_keys(spec, schema(), root)
    process = parse_base(fields["base"], root / "base")
    vocab = process.emission.shape[1]
    horizon = integer(fields["horizon"], root / "horizon", low=1)
    if horizon > MAX_HORIZON:
        (root / "horizon").fail(f"must be at most {MAX_HORIZON}, got {horizon!r:.30}; shorten the horizon")
    end = None
    if fields.get("end") is not None:
        end = integer(
            fields["end"], root / "end", low=0, high=vocab, what=f" (tokens of a vocabulary of {vocab})"
        )
    reward = parse_reward(fields["reward"], vocab, end, root / "reward")
    _check_size(reward, horizon, root / "reward")
    prompts = _parse_prompts(fields.get("prompts", [[]]), process, root / "prompts")
    name = fields.get("name", Path(where).stem)
    if not isinstance(name, str):
        (root / "name").fail(f"must be a string, got {name!r:.60}")
    automaton = to_automaton(reward)
    return World(
        name, to_hidden_markov(process), automaton, vocab, horizon, end, prompts, copy.deepcopy(fields)
    )


def _check_size(reward: Table, horizon: int, field: Field) -> None:
    if not math.isfinite(float(np.abs(reward.weight).max()) * horizon):
        field.fail("weights times horizon exceed the range of floating-point numbers; rescale the reward")


def _parse_prompts(value: object, process: Probabilities, field: Field) -> np.ndarray:
    """Prompts behind a begin mark, padded on the left with it; [P, L]."""
    vocab = process.emission.shape[1]
    prompts = [token_list(tokens, field[i], vocab) for i, tokens in enumerate(items(value, field))]
    for i, tokens in enumerate(prompts):
        position = impossible_token(process, tokens)
        if position is not None:
            problem = f"token {tokens[position]} has probability zero here under the base process"
            field[i][position].fail(f"{problem}; change the prompt or the base")
    width = 1 + max(len(tokens) for tokens in prompts)
    return np.array([[vocab] * (width - len(tokens)) + tokens for tokens in prompts], np.int32)


def load_world(path: str | Path) -> World:
    """Read a world from a JSON file; "-" reads standard input.

    Args:
      path: the file; its format is that of `kl_rl.worlds.schema()`.

    Returns:
      The world, named after the file unless it says otherwise.

    Raises:
      BadWorld: for a file that cannot be read, is not JSON (with line and column), or describes no world.
    """
    where = "standard input" if str(path) == "-" else str(path)
    return parse_world(_parse_json(_read(path, where), where), where)


def _read(path: str | Path, where: str) -> str:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise BadWorld(f"{where}: no such file; give the path of a world in JSON") from None
    except IsADirectoryError:
        raise BadWorld(f"{where}: is a directory; give the path of a world in JSON") from None
    except UnicodeDecodeError as error:
        raise BadWorld(f"{where}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadWorld(f"{where}: cannot be read ({reason})") from None


def _parse_json(text: str, where: str) -> object:
    if not text.strip():
        raise BadWorld(
            f"{where}: is empty; it must hold one JSON object (`kl-rl exact --schema` prints the format)"
        )
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise BadWorld(
            f"{where}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    except _DuplicateKey as error:
        raise BadWorld(
            f'{where}: the key "{error}" appears twice in one object; remove one of the two'
        ) from None
    except (ValueError, RecursionError) as error:
        raise BadWorld(f"{where}: not valid JSON: {error}") from None


class _DuplicateKey(Exception):
    """A JSON object names a key twice."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return seen
