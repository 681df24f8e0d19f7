"""Return tokens: where one ends and the next begins, and what an exported conditional model needs to be sampled."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kl_rl.core.mixtures import mixture
from kl_rl.core.policy import Policy
from kl_rl.huggingface.opened import Model, begin_of
from kl_rl.methods.conditioning import return_edges
from kl_rl.models import Execution, decoder_policy
from kl_rl.storage.errors import RunError

__all__ = [
    "RETURNS_FILE",
    "RETURN_TOKENS",
    "by_token",
    "deployed_policy",
    "padded_edges",
    "with_returns",
    "write_returns",
]

RETURN_TOKENS = 8
RETURNS_FILE = "kl_rl_returns.json"


def padded_edges(reward: np.ndarray) -> np.ndarray:
    """Boundaries between return tokens, see ``kl_rl.methods.return_edges``, in an array of known size.

    Args:
      reward: of samples of the base; [N].

    Returns:
      Ascending, infinite where there are fewer levels than tokens; float32 [R - 1].

    Raises:
      RunError: all samples have the same reward.
    """
    edges = return_edges(reward, tokens=RETURN_TOKENS)
    if not len(edges):
        raise RunError(
            f"all {reward.size} completions score {reward.flat[0]:g}: there is no return to condition "
            "on; use another reward, a longer --horizon or other prompts"
        )
    padded = np.full(RETURN_TOKENS - 1, np.inf, np.float32)
    padded[: len(edges)] = edges
    return padded


def by_token(reward: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Rewards as a conditional model knows them: each is the mean of the base's that share its return token.

    Args:
      reward: of any completions.
      base: of the base's, from which the boundaries between tokens are.

    Returns:
      As ``reward``.
    """
    edges = return_edges(base.ravel(), tokens=RETURN_TOKENS)
    token = lambda x: np.searchsorted(edges, x, side="right")
    mass = np.maximum(np.bincount(token(base.ravel()), minlength=len(edges) + 1), 1)
    return (np.bincount(token(base.ravel()), base.ravel(), len(edges) + 1) / mass)[token(reward)]


def write_returns(folder: Path, first_token: int, log_prior: np.ndarray, edges: np.ndarray) -> None:
    """Write what is needed to sample the exported conditional model: ids, edges and the return prior."""
    finite = lambda x: [float(v) if np.isfinite(v) else None for v in x]
    spec = {"first_token": first_token, "log_prior": finite(log_prior), "edges": finite(edges)}
    (folder / RETURNS_FILE).write_text(json.dumps(spec, indent=1) + "\n", "utf-8")


def deployed_policy(folder: Path, policy: Policy) -> Policy:
    """The policy of an exported folder: the mixture over return tokens if it is a conditional model.

    Args:
      folder: of the checkpoint.
      policy: of its weights.

    Returns:
      The policy.

    Raises:
      RunError: a damaged file of returns.
    """
    path = folder / RETURNS_FILE
    if not path.is_file():
        return policy
    try:
        spec: dict[str, Any] = json.loads(path.read_text("utf-8"))
        log_prior = jnp.array([-jnp.inf if v is None else v for v in spec["log_prior"]], jnp.float32)
        tokens = int(spec["first_token"]) + jnp.arange(len(spec["log_prior"]))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged: {error}; export the model again") from error
    return mixture(policy, tokens, log_prior)


def with_returns(model: Model, execution: Execution | None = None) -> Model:
    """A model with return tokens: input-only ids behind the begin mark that are still free, or new rows.

    New rows, and free ones, read like the begin mark (the mean token if there is none), so that p0 and the untrained
    conditional model agree.

    Args:
      model: the base.
      execution: how it is run.

    Returns:
      The model, with ``first_token`` set.
    """
    config, begin = model.config, begin_of(model.tokenizer)
    table = model.base.params["embed"]["table"]
    rows = config.vocab + config.extra
    like = jnp.mean(table[: config.vocab], axis=0) if begin is None else table[begin]
    free = 0 if begin is None or begin < config.vocab else rows - begin - 1
    if free < RETURN_TOKENS:
        config = dataclasses.replace(config, extra=config.extra + RETURN_TOKENS)
        table = jnp.pad(table, ((0, RETURN_TOKENS), (0, 0)))
    first = config.vocab + config.extra - RETURN_TOKENS
    table = table.at[first:].set(like)
    weights = model.base.params | {"embed": {"table": table}}
    return model._replace(config=config, base=decoder_policy(config, weights, execution), first_token=first)
