"""Sharding of tables, runs saved and picked up, and the numpyro oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from protocol import HORIZON, ground_with, made, posterior_of, reward_fn

from kl_rl import exact
from kl_rl.methods import fit, fresh, method_named
from kl_rl.raters.numpyro_bridge import as_numpyro
from kl_rl.sharding import make_mesh, place
from kl_rl.storage.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("compile_quickly")


def training(name, num_steps):
    """A run before its first step, its base, and ``(run, base) -> run`` some steps later."""
    method, ground = method_named(name), ground_with(1)
    algorithm = made(method, ground, optax.adam(0.05))
    source = fresh(ground.prompt, reward_fn, num_samples=16, horizon=HORIZON, memory=method.memory)
    posterior = lambda base: posterior_of(method, base)
    run = fit.start(algorithm, ground.base, posterior(ground.base), source, jax.random.key(0))
    steps = lambda run, base: fit.advance(algorithm, run, posterior(base), source, num_steps=num_steps)[0]
    return run, ground.base, jax.jit(steps)


@pytest.mark.parametrize(
    "name", ["rloo", "ppo", "best-of-n", "dt-tilted", "subtb-replay", "alpha-0.5", "dpo"]
)
@pytest.mark.parametrize("shape", [(1, 3), (2, 3)])
def test_sharded_equals_unsharded(name, shape):
    """One representative of each family, parameters split in three, on 3 and on 6 of the simulated devices."""
    run, base, step = training(name, 3)
    plain = step(run, base)
    mesh = make_mesh(*shape)
    placed_run, placed_base = place(run, mesh), place(base, mesh)
    assert len(placed_base.params.sharding.device_set) == shape[0] * shape[1]
    assert not placed_base.params.sharding.is_fully_replicated
    placed = step(placed_run, placed_base)
    np.testing.assert_allclose(placed.state.policy.params, plain.state.policy.params, rtol=1e-9, atol=1e-11)


def test_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ValueError, match="needs 1000 devices"):
        make_mesh(10, 100)


@pytest.mark.parametrize("name", ["ppo", "expert-iteration", "dt-tilted", "tb-replay"])
def test_resume_is_bit_equal(name, tmp_path):
    """Six steps in one go, and three, saved, restored into a fresh run, and three more."""
    run, base, step = training(name, 3)
    half = step(run, base)
    whole = step(half, base)
    store = Checkpoints(tmp_path / "run")
    store.save(3, half)
    store.close()
    again = Checkpoints(tmp_path / "run")
    resumed = step(again.restore(run), base)
    again.close()
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        data = (
            (lambda x: jax.random.key_data(x)) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else np.asarray
        )
        np.testing.assert_array_equal(data(a), data(b))


def test_numpyro_agrees_on_the_evidence_lower_bound(tiny):
    """Somebody else's estimator: numpyro's Trace_ELBO is log Z - KL(q || p*) within its own standard error."""
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import Trace_ELBO

    log_evidence = tiny.reward / 0.8
    log_q = tiny.tilt(2.0)

    def guide():
        numpyro.sample("y", dist.Categorical(logits=log_q))

    elbo = Trace_ELBO(num_particles=200)
    model = as_numpyro(tiny.log_base, log_evidence)
    values = np.array([-elbo.loss(jax.random.key(i), {}, model, guide) for i in range(100)])
    log_z = exact.log_partition(tiny.log_base, log_evidence)
    truth = log_z - exact.kl_divergence(log_q, exact.log_posterior(tiny.log_base, log_evidence))
    assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / 10
