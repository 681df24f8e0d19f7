"""A small byte model from a text: windows behind a begin mark, AdamW with warm-up and cosine, exported."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kl_rl.data import TextWindows
from kl_rl.huggingface import save_checkpoint
from kl_rl.models import DecoderConfig, Execution, count_parameters, init_weights, packed_log_probs, tied_rows
from kl_rl.runs.returns import RETURN_TOKENS
from kl_rl.runs.settings import Pretraining
from kl_rl.storage.errors import RunError
from kl_rl.storage.loop import Position, pick_up, run_steps, to_stderr
from kl_rl.storage.preemption import Preemption
from kl_rl.tokenizer import ByteTokenizer

__all__ = ["Text", "planned_steps", "pretrain", "read_text"]

_SPEED = 6e10  # floating-point operations a second that minutes are reckoned with: two CPU cores
_OVERHEAD = 8e-3  # seconds a step, whatever its size
_PASSES = 40  # over the text at most
_HELD_OUT = 64  # windows
_REPORTS = 20

Progress = Callable[[float, str], None]


class Text(NamedTuple):
    """Bytes to train on and bytes to measure on, the last twentieth.

    Attributes:
      train: uint8 [N].
      held_out: uint8 [M].
    """

    train: np.ndarray
    held_out: np.ndarray

    @property
    def unigram_entropy(self) -> float:
        """Cross-entropy of the held-out bytes under the frequencies of all, nats per byte: a memoryless model."""
        count = np.bincount(self.train, minlength=256) + np.bincount(self.held_out, minlength=256)
        share = count[self.held_out] / count.sum()
        return float(-np.log(share).mean())


class Fitted(NamedTuple):
    """Weights and optimizer state."""

    weights: Any
    optimizer: Any


def read_text(path: str, window: int) -> Text:
    """Read a text.

    Args:
      path: any file; its bytes are what is learned.
      window: shortest part, bytes.

    Returns:
      The text.

    Raises:
      RunError: it cannot be read or is too short.
    """
    try:
        data = np.frombuffer(Path(path).expanduser().read_bytes(), np.uint8)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error
    cut = len(data) - max(window, len(data) // 20)
    if cut < 4 * window:
        raise RunError(
            f"{path}: has {len(data)} bytes, fewer than five windows of {window}; "
            "give a longer text or a smaller --context"
        )
    return Text(data[:cut], data[cut:])


def planned_steps(plan: Pretraining, config: DecoderConfig, size: int) -> int:
    """Steps that fit into the minutes, but at most 40 passes over the text.

    Args:
      plan: with minutes or steps.
      config: of the model.
      size: of the training text, bytes.

    Returns:
      Number of steps.
    """
    if plan.steps is not None:
        return plan.steps
    tokens = plan.batch * plan.context
    weights = count_parameters(config) - config.context * config.width
    attention = 2 * config.layers * config.width * plan.context
    affordable = plan.minutes * 60.0 / (6.0 * (weights + attention) * tokens / _SPEED + _OVERHEAD)
    return max(1, round(min(affordable, _PASSES * size / tokens)))


def _optimizer(steps: int, rate: float) -> optax.GradientTransformation:
    warm = max(1, steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm, max(steps, warm + 1), 0.01 * rate)
    decayed = lambda tree: jax.tree.map(lambda x: x.ndim > 2, tree)
    adam = optax.adamw(schedule, b2=0.99, weight_decay=0.01, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


class _Programs(NamedTuple):
    begin: Callable[[jax.Array], Fitted]
    step: Callable[[Fitted, jax.Array], tuple[Fitted, jax.Array]]
    loss: Callable[[Any, jax.Array], jax.Array]


def _programs(plan: Pretraining, config: DecoderConfig, steps: int) -> _Programs:
    optimizer, execution = _optimizer(steps, plan.learning_rate), Execution()

    def loss(weights: Any, ids: jax.Array) -> jax.Array:
        return -jnp.mean(packed_log_probs(config, execution, weights, ids))

    def begin(key: jax.Array) -> Fitted:
        weights = init_weights(key, config)
        return Fitted(weights, optimizer.init(weights))

    def step(fitted: Fitted, ids: jax.Array) -> tuple[Fitted, jax.Array]:
        value, grads = jax.value_and_grad(loss)(fitted.weights, ids)
        updates, state = optimizer.update(grads, fitted.optimizer, fitted.weights)
        return Fitted(optax.apply_updates(fitted.weights, updates), state), value

    return _Programs(jax.jit(begin), jax.jit(step, donate_argnums=0), jax.jit(loss))


def _marked(windows: np.ndarray, begin: int) -> np.ndarray:
    """Windows behind the begin mark; [B, S - 1] -> int32 [B, S]."""
    return np.concatenate([np.full((len(windows), 1), begin, np.int32), windows.astype(np.int32)], axis=1)


def model_config(plan: Pretraining) -> DecoderConfig:
    """Bytes and an end token are emitted; the begin mark and return tokens are only read."""
    tokenizer, options = ByteTokenizer(), {"heads": plan.heads, "context": plan.context}
    extra = 1 + RETURN_TOKENS
    return DecoderConfig.gpt2(
        tokenizer.vocab_size, width=plan.width, layers=plan.layers, extra=extra, **options
    )


def _silent(fraction: float, message: str) -> None:
    """No progress report."""


def pretrain(
    plan: Pretraining,
    text: Text,
    folder: Path,
    *,
    progress: Progress = _silent,
    say: Callable[[str], None] = to_stderr,
    preemption: Preemption | None = None,
) -> dict[str, float]:
    """Train a byte model and export it to ``folder/model``; picked up from the newest checkpoint of the folder.

    Args:
      plan: sizes.
      text: from ``read_text``.
      folder: of the run, held by this process alone.
      progress: called with a fraction of the work and a message.
      say: told about damaged checkpoints.
      preemption: hears signals; None: one of its own.

    Returns:
      ``held_out_loss`` and ``unigram_entropy`` in nats per byte, ``steps``, ``parameters``.

    Raises:
      Stopped: by SIGTERM or Ctrl-C, after saving.
      RunError, SaveError: see the modules.
    """
    config, tokenizer = model_config(plan), ByteTokenizer()
    steps = planned_steps(plan, config, len(text.train))
    programs, window = _programs(plan, config, steps), plan.context - 1
    windows = TextWindows(text.train, window)
    held_out = TextWindows(text.held_out, window).sample(0, _HELD_OUT, seed=plan.seed)
    held_out, unigram = _marked(held_out, tokenizer.begin_id), text.unigram_entropy
    every = max(1, steps // _REPORTS)

    def advance(fitted: Fitted, step: int) -> Fitted:
        ids = _marked(windows.sample(step, plan.batch, seed=plan.seed), tokenizer.begin_id)
        fitted, loss = programs.step(fitted, jnp.asarray(ids))
        row = {"step": step + 1, "loss": float(loss)}
        if (step + 1) % every == 0 or step + 1 == steps:
            row["held_out_loss"] = float(programs.loss(fitted.weights, jnp.asarray(held_out)))
            message = f"held-out loss {row['held_out_loss']:.3f} nats per byte (unigram {unigram:.3f})"
            progress((step + 1) / steps, f"step {step + 1} of {steps}: {message}")
        kept.journal.write("metrics.jsonl", row)
        return fitted

    with Preemption() if preemption is None else contextlib.nullcontext(preemption) as heard:
        first = programs.begin(jax.random.key(plan.seed))
        kept, position = pick_up(folder, first, ("metrics.jsonl",), max(1, steps // 10), say=say)
        position = position or Position(0, first, {})
        try:
            fitted = run_steps(kept, position.tree, position.step, steps, advance, heard)
        finally:
            kept.close()
    table = tied_rows(fitted.weights["embed"]["table"], tokenizer.begin_id)
    weights = jax.device_get(fitted.weights | {"embed": {"table": table}})
    save_checkpoint(folder / "model", config, weights, tokenizer_from=tokenizer)
    loss = float(programs.loss(fitted.weights, jnp.asarray(held_out)))
    return {
        "held_out_loss": loss,
        "unigram_entropy": unigram,
        "steps": steps,
        "parameters": count_parameters(config),
    }
