"""Worlds made from a seed, and the two standard worlds that tests and benchmarks share."""

from __future__ import annotations

from typing import Any

import numpy as np

from kl_rl.worlds.world import World, parse_world

__all__ = ["default_world", "full_world", "generate_world"]


def generate_world(
    seed: int,
    *,
    vocab: int = 4,
    horizon: int = 6,
    states: int = 4,
    kind: str = "hmm",
    reward: dict[str, Any] | None = None,
    reward_states: int = 3,
    end: int | None = None,
    prompts: list[list[int]] | None = None,
    concentration: float = 1.0,
) -> World:
    """A random world: Dirichlet rows for the base, a random automaton with integer weights for the reward.

    Args:
      seed: any integer; the same arguments always give the same world.
      vocab: V.
      horizon: T.
      states: hidden states S of an "hmm"; ignored for "markov".
      kind: "hmm" or "markov", as in the world file.
      reward: the reward of the world file; None draws an automaton with weights in {-1, 0, 1, 2}.
      reward_states: Q of the drawn automaton.
      end: end token, or None.
      prompts: token lists, or None for one empty prompt.
      concentration: Dirichlet parameter of every row; small values give nearly deterministic rows.

    Returns:
      The world.

    Raises:
      BadWorld: if the arguments describe none.
    """
    rng = np.random.default_rng(seed)

    def rows(count: int, size: int) -> list[list[float]]:
        return rng.dirichlet(np.full(size, concentration), count).tolist()

    size = vocab if kind == "markov" else states
    base: dict[str, Any] = {"kind": kind, "initial": rows(1, size)[0], "transition": rows(size, size)}
    if kind != "markov":
        base["emission"] = rows(size, vocab)
    drawn = {
        "start": 0,
        "next": rng.integers(reward_states, size=(reward_states, vocab)).tolist(),
        "weight": rng.integers(-1, 3, size=(reward_states, vocab)).tolist(),
    }
    spec: dict[str, Any] = {"name": f"{kind}-{seed}", "base": base, "horizon": horizon}
    spec |= {"reward": drawn if reward is None else reward}
    spec |= {"end": end} if end is not None else {}
    spec |= {"prompts": prompts} if prompts is not None else {}
    return parse_world(spec, f"generate_world(seed={seed})")


def _standard_spec(name: str, horizon: int) -> dict[str, Any]:
    """Sticky four-state process; reward = sentiment with a wedding party, plus matches at distance 3."""
    sentiment = {"kind": "sentiment", "positive": [2], "negative": [1], "wedding": [3, 2, 3], "bonus": 2}
    return {
        "name": name,
        "base": {
            "kind": "hmm",
            "initial": [0.4, 0.3, 0.2, 0.1],
            "transition": [
                [0.85, 0.05, 0.05, 0.05],
                [0.10, 0.75, 0.10, 0.05],
                [0.05, 0.15, 0.70, 0.10],
                [0.10, 0.05, 0.20, 0.65],
            ],
            "emission": [
                [0.62, 0.23, 0.10, 0.05],
                [0.16, 0.60, 0.14, 0.10],
                [0.15, 0.20, 0.50, 0.15],
                [0.25, 0.10, 0.25, 0.40],
            ],
        },
        "reward": {"kind": "sum", "terms": [sentiment, {"kind": "pair_match", "distance": 3}]},
        "horizon": horizon,
    }


def default_world() -> World:
    """The standard small world: V = 4, T = 6 (4096 strings), a sticky hidden Markov base, an integer reward.

    The reward is a sentiment score (+1 for token 2, -1 for token 1) whose motif 3 2 3 opens a "wedding party"
    in which every further token earns 2, plus 1 for every token that equals the one three places before it.
    """
    return parse_world(_standard_spec("default", 6), "default_world()")


def full_world() -> World:
    """As `default_world` with T = 8 (65 536 strings)."""
    return parse_world(_standard_spec("full", 8), "full_world()")
