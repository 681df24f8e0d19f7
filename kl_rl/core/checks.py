"""Whether a model of one's own keeps the contract of a policy: shapes, causality, its several forms in agreement."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.core import numerics
from kl_rl.core.policy import Policy, log_prob_of, vocabulary
from kl_rl.core.sampler import Progress, begin, finish, proceed, reorder
from kl_rl.core.trajectories import Trajectories
from kl_rl.core.twist import Twist, prefix_twists, present_twist

__all__ = ["check_policy"]

# Rounding of a deep model, in nats: what is wrong by more is wrong.
_ROUNDING = {"float64": 1e-8, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}


def check_policy(
    policy: Policy,
    *,
    prompt: jax.Array | None = None,
    num_samples: int = 3,
    horizon: int = 5,
    twist: Twist | None = None,
    key: jax.Array | None = None,
    tolerance: float | None = None,
    trained: bool = True,
) -> None:
    """Check that a policy is what the library takes it for, on a few strings that it writes itself.

    That its parameters can be trained and its functions compared by value; that ``apply`` gives logits [..., T, V] that
    are no NaN and leave a token possible; that row t sees ``tokens[..., :t]`` only; that decoder (sampling, forking,
    regathering), scorer and trunk say what ``apply`` says; the same of a twist beside it.

    Args:
      policy: the model.
      prompt: ids to try it on; random ones if None; [P, L].
      num_samples: K.
      horizon: T, at least 2.
      twist: optional head to check as well.
      key: PRNG key.
      tolerance: largest difference between two forms, in nats; by the types of weights and logits if None.
      trained: whether its parameters are to be trained; a mixture, say, is not.

    Raises:
      ValueError: with all that is wrong, one fault a line.
    """
    _check_static(policy, "policy", trained)
    if twist is not None:
        _check_static(twist, "twist", trained)
    keys = jax.random.split(jax.random.key(0) if key is None else key, 3)
    if prompt is None:
        vocab = vocabulary(policy, jnp.zeros((2, 4), jnp.int32))
        prompt = jax.random.randint(keys[0], (2, 4), 0, vocab, jnp.int32)
    vocab = vocabulary(policy, prompt)
    batch = _written(policy, keys[1], prompt, num_samples, horizon)
    rows = jnp.repeat(prompt[:, None], num_samples, axis=1)
    logits = jax.jit(lambda p, *ids: p.logits(*ids))(policy, rows, batch.tokens)
    near = functools.partial(_near, _rounding(policy, logits) if tolerance is None else tolerance)
    faults = _wrong_logits(logits)
    if not faults:
        model = log_prob_of(logits, batch.tokens)
        faults += _wrong_causality(policy.apply, policy.weights, rows, batch.tokens, near, "policy.apply")
        faults += near(batch.log_behaviour, model, "policy.decoder does not say what policy.apply says")
        faults += _wrong_forms(policy, batch, logits, model, near)
        faults += _wrong_gathering(policy, keys[2], prompt, num_samples, horizon, near)
    if twist is not None:
        faults += _wrong_twist(policy, twist, batch, keys[2], near, vocab)
    if faults:
        raise ValueError("\n".join(faults))


def _rounding(policy: Policy, logits: jax.Array) -> float:
    """That of the narrowest type that is in play."""
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves((policy.weights, logits))}
    return max(_ROUNDING.get(kind, 0.0) for kind in kinds)


def _check_static(model: Policy | Twist, name: str, trained: bool) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params) if trained else ():
        kind = getattr(leaf, "dtype", None)
        if kind is None or not jnp.issubdtype(kind, jnp.inexact):
            where = name + ".params" + jax.tree_util.keystr(path)
            raise ValueError(
                f"{where} is {kind or type(leaf).__name__}: gradients are taken of floating-point arrays only; "
                f"what is not trained belongs into {name}.shared"
            )
    for field in dataclasses.fields(model):
        try:
            if field.metadata.get("static"):
                hash(getattr(model, field.name))
        except TypeError as error:
            raise ValueError(f"{name}.{field.name} must be hashable and equal by value: {error}") from None


def _written(
    policy: Policy, key: jax.Array, prompt: jax.Array, num_samples: int, horizon: int
) -> Trajectories:
    """What the policy writes, with its own log-probabilities."""

    def draw(policy, key):
        first = begin(policy, key, prompt, num_samples=num_samples, horizon=horizon)
        return finish(proceed(policy, first, num_steps=horizon), num_samples)

    try:
        drawn = jax.jit(draw)(policy, key)
    except TypeError as error:  # a loop carries what keeps its shape and type
        raise ValueError(
            f"policy.decoder.step must return a cache like the one it is given: {error}"
        ) from None
    zero = jnp.zeros(drawn.tokens.shape[:2])
    return Trajectories(prompt, drawn.tokens, drawn.mask, jnp.ones_like(drawn.mask), drawn.log_model, zero)


def _near(tolerance: float, found: jax.Array, expected: jax.Array, fault: str) -> list[str]:
    """No fault, or one that says how far two arrays differ, and where; the -inf of both agree."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        return [f"{fault}: shape {a.shape} where {b.shape} is expected"]
    with np.errstate(invalid="ignore"):
        off = np.where(a == b, 0.0, np.abs(a - b))
    off = np.where(np.isnan(off), np.inf, off)
    if off.max(initial=0.0) <= tolerance:
        return []
    place = tuple(int(i) for i in np.unravel_index(np.argmax(off), off.shape))
    return [f"{fault}: {a[place]:.6g} and {b[place]:.6g} at {list(place)} (allowed: {tolerance:g} nats)"]


def _wrong_logits(logits: jax.Array) -> list[str]:
    values = np.asarray(logits, np.float64)
    if np.isnan(values).any() or (values == np.inf).any():
        return ["policy.apply gives logits that are NaN or +inf"]
    dead = np.isneginf(values.max(-1))
    if dead.any():
        return [f"policy.apply leaves no token possible in row {[int(i) for i in np.argwhere(dead)[0]]}"]
    return []


def _wrong_causality(
    apply: Any, weights: Any, prompt: jax.Array, tokens: jax.Array, near: Any, name: str
) -> list[str]:
    """Rows up to t may not change when token t does."""
    run = jax.jit(apply)
    before = run(weights, prompt, tokens)
    for t in range(tokens.shape[-1]):
        other = jnp.where(tokens[..., t] == 0, 1, 0)
        after = run(weights, prompt, tokens.at[..., t].set(other))
        rows = slice(None), slice(None), slice(0, t + 1)
        fault = near(
            after[rows], before[rows], f"{name} sees the future: token {t} changes the rows before it"
        )
        if fault:
            return fault
    return []


def _wrong_forms(
    policy: Policy, batch: Trajectories, logits: jax.Array, model: jax.Array, near: Any
) -> list[str]:
    faults = []
    if policy.scorer is not None:
        found = jax.jit(policy.scorer)(policy.weights, batch.prompt, batch.tokens)
        faults += near(found, model, "policy.scorer does not say what policy.apply says")
    if policy.trunk is not None:
        features = jax.jit(policy.trunk.hidden)(policy.weights, batch.prompt, batch.tokens)
        whole = jax.jit(policy.trunk.logits)(policy.weights, features)
        wide = jnp.promote_types(logits.dtype, jnp.float32)
        law = lambda x: numerics.safe_log_softmax(x.astype(wide))
        faults += near(law(whole), law(logits), "policy.trunk does not say what policy.apply says")
    return faults


def _halfway(policy: Policy, key: jax.Array, prompt: jax.Array, num_samples: int, horizon: int) -> Progress:
    first = begin(policy, key, prompt, num_samples=num_samples, horizon=horizon)
    return proceed(policy, first, num_steps=horizon // 2)


def _wrong_gathering(
    policy: Policy, key: jax.Array, prompt: jax.Array, num_samples: int, horizon: int, near: Any
) -> list[str]:
    """Half-way, every row goes on from the first row of its prompt."""
    if policy.decoder is None or policy.decoder.gather is None:
        return []
    ancestor = jnp.repeat(jnp.arange(prompt.shape[0]) * num_samples, num_samples)

    def draw(policy, key):
        progress = reorder(policy, _halfway(policy, key, prompt, num_samples, horizon), ancestor)
        return finish(proceed(policy, progress, num_steps=horizon), num_samples)

    drawn = jax.jit(draw)(policy, key)
    rows = jnp.repeat(prompt[:, None], num_samples, axis=1)
    model = jax.jit(lambda p, *ids: log_prob_of(p.logits(*ids), ids[1]))(policy, rows, drawn.tokens)
    return near(drawn.log_model, model, "policy.decoder.gather does not go on from the ancestors")


def _wrong_twist(
    policy: Policy, twist: Twist, batch: Trajectories, key: jax.Array, near: Any, vocab: int
) -> list[str]:
    num_prompts, num_samples, horizon = batch.tokens.shape
    rows = jnp.repeat(batch.prompt[:, None], num_samples, axis=1)
    values = jax.jit(twist.apply)(twist.weights, rows, batch.tokens)
    plain = (num_prompts, num_samples, horizon + 1)
    if values.shape not in (plain, (*plain[:2], horizon, vocab)):
        return [f"twist.apply gives {values.shape}; it must be {plain}, or one for each token: (..., T, V)"]
    faults = _wrong_causality(twist.apply, twist.weights, rows, batch.tokens, near, "twist.apply")
    if twist.scorer is not None:
        found = jax.jit(prefix_twists)(twist, batch)
        faults += near(found, values, "twist.scorer does not say what twist.apply says")
    if twist.beside is not None:
        progress = jax.jit(lambda p: _halfway(p, key, batch.prompt, num_samples, horizon))(policy)
        found = jax.jit(present_twist)(twist, batch.prompt, progress)
        afresh = jax.jit(present_twist)(twist.alone(), batch.prompt, progress)
        faults += near(found, afresh, "twist.beside does not say what twist.apply says")
    return faults
