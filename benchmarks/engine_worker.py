"""The library's side of benchmarks/engine.py: one program of the public library, one step at a time.

python engine_worker.py rl|dpo|decode|train CONFIG_AS_JSON     # protocol of engine_peer.py
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import engine_peer
import numpy as np
from engine import Config

VOWELS = np.frombuffer(b"aeiou", np.uint8)
Program = Callable[[], Any]


def _prompts(config: Config, rows: int) -> Iterator[np.ndarray]:
    """Random lower-case letters and spaces, new ones at every step; int32 [rows, L]."""
    rng = np.random.default_rng(config.seed)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz     ", np.uint8)
    while True:
        yield rng.choice(letters, (rows, config.prompt)).astype(np.int32)


def _vowels(prompt, tokens, mask):
    """Fraction of lower-case vowels in each completion; [P, K]."""
    import jax.numpy as jnp

    return jnp.sum(jnp.isin(tokens, VOWELS) * mask, axis=-1) / jnp.sum(mask, axis=-1)


def _base(config: Config, vocab: int):
    """The network as a policy, with random weights."""
    import jax

    from kl_rl.models import DecoderConfig, decoder_policy, init_weights

    shape = DecoderConfig.gpt2(
        vocab, width=config.width, layers=config.layers, heads=config.heads, context=config.context
    )
    return shape, decoder_policy(shape, init_weights(jax.random.key(config.seed), shape))


def _split(config: Config) -> tuple[Any, Callable[[Any], Any]]:
    """The mesh, one device a core, and how arrays are split over it by row."""
    import jax

    from kl_rl.sharding import make_mesh

    mesh = make_mesh(data=config.devices)
    rows = jax.NamedSharding(mesh, jax.P("data"))
    return mesh, lambda array: jax.device_put(array, rows)


def rl(config: Config) -> Program:
    """Sample groups, score them under the frozen base, update the policy: RLOO in one compiled program."""
    import jax
    import jax.numpy as jnp
    import optax

    import kl_rl
    from kl_rl.methods.parts import in_parts
    from kl_rl.sharding import jit_step, place

    _, base = _base(config, config.vocab)
    mesh, rows = _split(config)
    algorithm = kl_rl.reinforce(optimizer=in_parts(optax.adamw(config.rl_rate), config.rl_parts))
    posterior = kl_rl.Posterior(base, kl_rl.Tilt(config.beta))
    prompts = _prompts(config, config.batch // config.group)

    def source(prompt):
        return kl_rl.fresh(prompt, _vowels, num_samples=config.group, horizon=config.new)

    def step(run, posterior, prompt):
        return kl_rl.advance(algorithm, run, posterior, source(prompt), num_steps=1)

    run = kl_rl.start(algorithm, base, posterior, source(jnp.asarray(next(prompts))), jax.random.key(1))
    run, posterior = place((run, posterior), mesh)  # copies: the run is donated, the base is not
    return _carried(jit_step(step, run, mesh), run, lambda: (posterior, rows(next(prompts))))


def dpo(config: Config) -> Program:
    """Score pairs under base and policy, update the policy."""
    import optax

    import kl_rl
    from kl_rl.methods.parts import in_parts
    from kl_rl.sharding import jit_step, place, place_batch

    _, base = _base(config, config.vocab)
    mesh, _ = _split(config)
    algorithm = kl_rl.dpo(optimizer=in_parts(optax.adamw(config.rl_rate), config.dpo_parts))
    posterior = kl_rl.Posterior(base, kl_rl.Tilt(config.dpo_beta))
    prompts, rng = _prompts(config, config.batch), np.random.default_rng(config.seed)
    ones = np.ones((config.batch, 2, config.new), np.float32)
    reward = np.zeros((config.batch, 2), np.float32)  # nobody knows it
    label = np.tile(np.float32([1.0, 0.0]), (config.batch, 1))

    def batch():
        tokens = rng.integers(0, 256, ones.shape).astype(np.int32)
        return place_batch(kl_rl.Trajectories(next(prompts), tokens, ones, ones, -ones, reward, label), mesh)

    state, posterior = place((algorithm.init(base), posterior), mesh)
    return _carried(jit_step(algorithm.step, state, mesh), state, lambda: (posterior, batch()))


def decode(config: Config) -> Program:
    """Sample one completion for each of many prompts."""
    import itertools

    import jax

    import kl_rl
    from kl_rl.sharding import place

    _, policy = _base(config, config.bytes)
    mesh, rows = _split(config)
    prompts, seeds = _prompts(config, config.decode_batch), itertools.count()
    draw = jax.jit(
        lambda policy, key, prompt: kl_rl.generate(policy, key, prompt, num_samples=1, horizon=config.new)
    )
    policy = place(policy, mesh)

    def call():
        with jax.set_mesh(mesh):
            return draw(policy, jax.random.key(next(seeds)), rows(next(prompts)))

    return call


def train(config: Config) -> Program:
    """Next-token cross-entropy and AdamW, gradients summed over parts of the batch."""
    import jax
    import jax.numpy as jnp
    import optax

    from kl_rl.models import Execution, packed_log_probs
    from kl_rl.sharding import jit_step, place

    shape, policy = _base(config, config.bytes)
    mesh, split = _split(config)
    optimizer, rng = optax.adamw(config.train_rate, weight_decay=0.01), np.random.default_rng(config.seed)

    def loss(weights, ids):
        return -jnp.mean(packed_log_probs(shape, Execution(), weights, ids))

    def step(carried, ids):
        weights, state = carried
        parts = jnp.moveaxis(
            ids.reshape(-1, config.train_parts, ids.shape[-1]), 1, 0
        )  # rows stay where they are
        if config.train_parts == 1:
            value, grads = jax.value_and_grad(loss)(weights, parts[0])
        else:
            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
            add = lambda total, part: jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(weights, part))
            total, _ = jax.lax.scan(lambda c, part: (add(c, part), None), zero, parts)
            value, grads = jax.tree.map(lambda x: x / config.train_parts, total)
        updates, state = optimizer.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), state), value

    rows = (config.batch, config.train_length + 1)
    ids = lambda: rng.integers(0, config.bytes, rows).astype(np.int32)
    carried = place((policy.params, optimizer.init(policy.params)), mesh)
    return _carried(jit_step(step, carried, mesh), carried, lambda: (split(ids()),))


def _carried(step: Any, carried: Any, inputs: Callable[[], tuple]) -> Program:
    """A call that keeps what it carries from step to step and returns the rest."""
    held = [carried]

    def call():
        held[0], info = step(held[0], *inputs())
        return info, held[0]

    return call


PROGRAMS = {"rl": rl, "dpo": dpo, "decode": decode, "train": train}


def about(config: Config, name: str) -> dict[str, Any]:
    """What belongs to the figures: number of parameters, versions, device."""
    from importlib.metadata import version

    import jax

    from kl_rl.models import count_parameters

    shape, _ = _base(config, config.vocab if name in ("rl", "dpo") else config.bytes)
    versions = {package: version(package) for package in ("kl-rl", "jax", "jaxlib", "optax", "flax")}
    return {
        "params": count_parameters(shape), "versions": versions, "device": jax.devices()[0].device_kind
    }  # fmt: skip


def main() -> None:
    name, config = sys.argv[1], Config(**json.loads(sys.argv[2]))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from kl_rl.cli.allocator import retain_freed_memory
    from kl_rl.sharding import split_cpu

    if config.retain:
        retain_freed_memory()
    split_cpu(config.devices)
    import jax

    from kl_rl.cli.cache import use_cache

    use_cache()
    call = PROGRAMS[name](config)
    while True:
        used, started = engine_peer.usage()[0], time.perf_counter()
        jax.block_until_ready(call())
        wall, (cpu, peak) = time.perf_counter() - started, engine_peer.usage()
        print(json.dumps({"wall": wall, "cpu": cpu - used, "peak": peak}), file=out, flush=True)
        if not sys.stdin.readline():
            break
    print(json.dumps({"about": about(config, name)}), file=out, flush=True)


if __name__ == "__main__":
    main()
