"""Two steps of a fine-tune on a mesh; the same function runs in one process and in each of many.

As a script: ``multiprocess_worker.py ADDRESS NUM_PROCESSES PROCESS_ID OUT.npz``.
"""

import os
import sys

SHAPE = (2, 2, 2)
NUM_STEPS = 2


def run_steps(shape):
    """Loss and parameters after two PPO steps on a mesh of all devices, as numpy arrays that every process has."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.experimental.multihost_utils import process_allgather

    from kl_rl import methods
    from kl_rl.core import rollouts
    from kl_rl.core.posterior import Posterior, Tilt
    from kl_rl.core.trajectories import Trajectories
    from kl_rl.models import DecoderConfig, Execution, decoder_policy, decoder_twist, init_weights
    from kl_rl.sharding import jit_step, make_mesh, place, place_batch

    config = DecoderConfig.gpt2(12, width=16, layers=2, heads=4, context=16)
    execution = Execution("float64", scan_layers=True, remat=True, fuse=False)
    weights = init_weights(jax.random.key(0), config, jnp.float64)
    base = decoder_policy(config, weights, execution)
    twist = decoder_twist(config, weights, execution, train_trunk=True)
    algorithm = methods.ppo(optimizer=optax.adam(1e-2, eps=1e-3), twist=twist, epochs=1)
    mesh = make_mesh(*shape)
    both = (algorithm.init(base), Posterior(base, Tilt(0.5)))
    state, posterior = place(both, mesh)
    tokens = jax.random.randint(jax.random.key(1), (8, 2, 5), 0, config.vocab)
    prompt = jax.random.randint(jax.random.key(2), (8, 3), 0, config.vocab)
    reward = jax.random.normal(jax.random.key(3), (8, 2))
    ones = jnp.ones(tokens.shape)
    whole = jax.tree.map(np.asarray, Trajectories(prompt, tokens, ones, ones, -2.0 * ones, reward))
    rows = np.array_split(np.arange(8), jax.process_count())[jax.process_index()]
    batch = place_batch(jax.tree.map(lambda leaf: leaf[rows], whole), mesh)
    step, out = jit_step(algorithm.step, state, mesh), {}
    for number in range(NUM_STEPS):
        state, info = step(state, posterior, batch)
        out[f"loss {number}"] = np.asarray(info.loss)
    gather = lambda x: np.asarray(process_allgather(x, tiled=True))
    for path, leaf in jax.tree.leaves_with_path(state.policy.params):
        out[jax.tree_util.keystr(path)] = gather(leaf)
    with jax.set_mesh(mesh):
        draw = jax.jit(
            lambda policy, key, prompt: rollouts.sample(policy, key, prompt, num_samples=2, horizon=5)
        )
        drawn = draw(state.policy, place(jax.random.key(4), mesh), batch.prompt)
    return out | {"tokens": gather(drawn[0]), "log_probs": gather(drawn[2])}


def main() -> None:
    """Join the other processes, run, and let process 0 write."""
    address, count, number, path = sys.argv[1:]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // int(count)}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(number))
    assert len(jax.devices()) == 8 and len(jax.local_devices()) == 8 // int(count)
    out = run_steps(SHAPE)
    if number == "0":
        np.savez(path, **out)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
