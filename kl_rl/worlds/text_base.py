"""The base model of a text: a small transformer over characters, trained by maximum likelihood and saved."""

from __future__ import annotations

import functools
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kl_rl import models
from kl_rl.core.policy import Policy, token_log_probs
from kl_rl.methods.likelihood import fit_likelihood
from kl_rl.worlds.text import BadText, Corpus

__all__ = ["BasePlan", "TextBase", "held_out_loss", "load_or_train", "train_base"]

RETURN_TOKENS = 8  # input ids kept free behind the begin mark
_SPEED = 6e10  # floating-point operations a second that `minutes` are reckoned with: two CPU cores
_OVERHEAD = 4e-3  # seconds a step, whatever its size
_CHUNKS = 20
_BATCH = 64

Progress = Callable[[float, str], None]


class BasePlan(NamedTuple):
    """Size of a base model and of its training.

    Attributes:
      window: characters of context, prompt and completion together.
      minutes: training time on two ordinary CPU cores; it fixes the number of steps, so runs can be repeated.
      width: of the transformer.
      layers: of the transformer.
      heads: of the transformer; they divide the width.
      learning_rate: peak, with linear warm-up and cosine decay.
      seed: of initialization and batches.
    """

    window: int = 48
    minutes: float = 5.0
    width: int = 128
    layers: int = 2
    heads: int = 4
    learning_rate: float = 3e-3
    seed: int = 0

    def steps(self, corpus: Corpus) -> int:
        """Gradient steps: what fits into the minutes, but at most 40 passes over the text."""
        params = 12 * self.layers * self.width**2 + 2 * self.width * len(corpus.alphabet)
        affordable = self.minutes * 60.0 / (6.0 * params * _BATCH * self.window / _SPEED + _OVERHEAD)
        passes = 40.0 * len(corpus.train) / (_BATCH * self.window)
        return _CHUNKS * max(1, round(min(affordable, passes) / _CHUNKS))


class TextBase(NamedTuple):
    """A trained base model.

    Attributes:
      policy: p0; reads return tokens as if they were the begin mark.
      held_out_loss: nats per character on held-out windows.
      unigram_entropy: what a memoryless model would reach there.
      steps: gradient steps taken.
      seconds: spent on them.
    """

    policy: Policy
    held_out_loss: float
    unigram_entropy: float
    steps: int
    seconds: float


@jax.jit
def _losses(policy: Policy, prompt: jax.Array, tokens: jax.Array) -> jax.Array:
    return -jnp.mean(token_log_probs(policy, prompt, tokens), axis=-1)


def held_out_loss(policy: Policy, windows: np.ndarray, begin: int, start: int = 0) -> np.ndarray:
    """Mean loss of each window, given the begin mark and its first `start` characters.

    Args:
      policy: any policy over the corpus's characters.
      windows: [N, W].
      begin: id of the begin mark.
      start: characters that are only conditioned on.

    Returns:
      Nats per character; [N].
    """
    prompt = np.concatenate([np.full((len(windows), 1), begin, np.int32), windows[:, :start]], axis=1)
    return np.asarray(_losses(policy, jnp.asarray(prompt), jnp.asarray(windows[:, start:])), np.float64)


@functools.partial(jax.jit, static_argnames=("num_steps", "window", "begin"))
def _chunk(policy, state, key, ids, starts, total, rate, *, num_steps, window, begin):
    """A few steps of AdamW; the length of the schedule is traced, so one program serves every corpus."""

    def batch(key):
        first = starts[jax.random.randint(key, (_BATCH,), 0, starts.shape[0])]
        tokens = ids[first[:, None] + jnp.arange(window)[None, :]]
        return jnp.full((_BATCH, 1), begin, jnp.int32), tokens, jnp.ones(tokens.shape, jnp.float32)

    optimizer = _optimizer(total, rate)
    return fit_likelihood(policy, batch, key, optimizer=optimizer, num_steps=num_steps, state=state)


def _optimizer(total: Any, rate: Any) -> optax.GradientTransformation:
    def schedule(count):
        share = jnp.minimum(count / total, 1.0)
        return rate * jnp.minimum(1.0, 20.0 * share + 1e-3) * (0.5 * (1.0 + jnp.cos(jnp.pi * share)) + 0.01)

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))


def _untrained(corpus: Corpus, plan: BasePlan) -> Policy:
    return models.small_policy(
        jax.random.key(plan.seed),
        len(corpus.alphabet),
        extra=1 + RETURN_TOKENS,
        context=plan.window + 1,
        width=plan.width,
        layers=plan.layers,
        heads=plan.heads,
    )


def _check(corpus: Corpus, plan: BasePlan) -> None:
    if plan.width % plan.heads:
        raise ValueError(f"width {plan.width} must be a multiple of the number of heads, {plan.heads}")
    if not 2 <= plan.window <= len(corpus.held_out) // 2:
        raise ValueError(f"window must lie between 2 and {len(corpus.held_out) // 2}, got {plan.window}")


def _silent(fraction: float, message: str) -> None:
    """No progress report."""


def train_base(corpus: Corpus, plan: BasePlan | None = None, progress: Progress = _silent) -> TextBase:
    """Maximize the likelihood of random windows; the best of 20 checkpoints on held-out text is kept.

    Args:
      corpus: the text.
      plan: sizes.
      progress: called with a fraction of the work and a message.

    Returns:
      The base model.

    Raises:
      ValueError: if the plan does not fit the corpus.
    """
    plan = plan or BasePlan()
    _check(corpus, plan)
    started, steps = time.perf_counter(), plan.steps(corpus)
    held_out, unigram = corpus.held_out_windows(256, plan.window), corpus.unigram_entropy
    ids, starts = jnp.asarray(corpus.train), jnp.asarray(corpus.starts(corpus.train, plan.window))
    policy = _untrained(corpus, plan)
    state = _optimizer(1.0, plan.learning_rate).init(policy.params)
    best: tuple[float, Policy] = (float("inf"), policy)
    for index, key in enumerate(jax.random.split(jax.random.key(plan.seed + 1), _CHUNKS)):
        policy, state, _ = _chunk(
            policy, state, key, ids, starts, float(steps), plan.learning_rate,
            num_steps=steps // _CHUNKS, window=plan.window, begin=corpus.begin,
        )  # fmt: skip
        loss = float(held_out_loss(policy, held_out, corpus.begin).mean())
        best = min(best, (loss, policy), key=lambda pair: pair[0])
        done = (index + 1) / _CHUNKS
        progress(done, f"base model: {loss:.3f} nats per character on held-out text (unigram {unigram:.3f})")
    tied = models.tie_extra_rows(best[1], corpus.begin)
    return TextBase(tied, best[0], unigram, steps, time.perf_counter() - started)


def load_or_train(
    corpus: Corpus, folder: Path | None, plan: BasePlan | None = None, progress: Progress = _silent
) -> TextBase:
    """The base model saved in a folder (`base.npz`, `base.json`), or a new one that is then saved there.

    Args:
      corpus: the text.
      folder: created if missing; None: nothing is read or written.
      plan: sizes.
      progress: of the training.

    Returns:
      The base model.

    Raises:
      BadText: if the folder holds a base model of another text or size, or a damaged one.
    """
    plan = plan or BasePlan()
    about = {"text": corpus.fingerprint, "plan": plan._asdict()}
    if folder is not None and (folder / "base.json").exists():
        return _load(folder, about, _untrained(corpus, plan))
    base = train_base(corpus, plan, progress)
    if folder is not None:
        _save(folder, base, about)
    return base


def _names(params: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def _replace(path: Path, write: Callable[[Any], None]) -> None:
    """Write beside the file, then put it in place at once."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as handle:
        write(handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)


def _save(folder: Path, base: TextBase, about: dict[str, Any]) -> None:
    """`base.json` is written last: where it exists, the parameters are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree.leaves(base.policy.params)
    arrays: dict[str, Any] = dict(zip(_names(base.policy.params), map(np.asarray, leaves), strict=True))
    _replace(folder / "base.npz", lambda handle: np.savez(handle, **arrays))
    facts = about | {k: v for k, v in base._asdict().items() if k != "policy"}
    _replace(folder / "base.json", lambda handle: handle.write(json.dumps(facts, indent=1).encode()))


def _load(folder: Path, about: dict[str, Any], template: Policy) -> TextBase:
    advice = "use another output folder, or delete base.npz and base.json to train again"
    try:
        facts = json.loads((folder / "base.json").read_text())
        if {k: facts[k] for k in about} != about:
            raise BadText(f"{folder}: holds a base model of another text or of other sizes; {advice}")
        with np.load(folder / "base.npz", allow_pickle=False) as saved:
            leaves = [saved[name] for name in _names(template.params)]
        shapes = [x.shape for x in jax.tree.leaves(template.params)]
        if [x.shape for x in leaves] != shapes:
            raise ValueError("shapes differ")
        params = jax.tree.unflatten(jax.tree.structure(template.params), [jnp.asarray(x) for x in leaves])
        return TextBase(
            template.with_params(params), *(facts[name] for name in TextBase._fields if name != "policy")
        )
    except BadText:
        raise
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise BadText(f"{folder}: the saved base model cannot be read ({error}); {advice}") from None
