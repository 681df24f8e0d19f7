"""Sharding of tables, runs saved and picked up, and the numpyro oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_families import METHODS, source_for

from kl_rl import exact
from kl_rl.core.posterior import Posterior
from kl_rl.methods import fit
from kl_rl.raters.numpyro_bridge import as_numpyro
from kl_rl.sharding import make_mesh, place
from kl_rl.storage.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("compile_quickly")


def trained(name, tiny, run, base, num_steps):
    make, evidence, _, _ = METHODS[name]
    algorithm, source = make(tiny, optax.adam(0.05)), source_for(name, tiny, 16)
    if run is None:
        run = fit.start(algorithm, base, Posterior(base, evidence), source, jax.random.key(0))
    step = jax.jit(
        lambda run, base: fit.advance(algorithm, run, Posterior(base, evidence), source, num_steps=num_steps)
    )
    return run, lambda run, base: step(run, base)[0]


@pytest.mark.parametrize(
    "name", ["reinforce", "ppo", "best_of_n", "decision_transformer", "subtrajectory_balance", "dpo"]
)
@pytest.mark.parametrize("shape", [(1, 3), (2, 3)])
def test_sharded_equals_unsharded(name, shape, tiny):
    """One representative of each family, parameters split in three, on 3 and on 6 of the simulated devices."""
    run, step = trained(name, tiny, None, tiny.base, 3)
    plain = step(run, tiny.base)
    mesh = make_mesh(*shape)
    placed_run, placed_base = place(run, mesh), place(tiny.base, mesh)
    assert len(placed_base.params.sharding.device_set) == shape[0] * shape[1]
    assert not placed_base.params.sharding.is_fully_replicated
    placed = step(placed_run, placed_base)
    np.testing.assert_allclose(placed.state.policy.params, plain.state.policy.params, rtol=1e-9, atol=1e-11)


def test_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ValueError, match="needs 1000 devices"):
        make_mesh(10, 100)


@pytest.mark.parametrize("name", ["ppo", "expert_iteration", "decision_transformer", "trajectory_balance"])
def test_resume_is_bit_equal(name, tiny, tmp_path):
    """Six steps in one go, and three, saved, restored into a fresh run, and three more."""
    run, step = trained(name, tiny, None, tiny.base, 3)
    half = step(run, tiny.base)
    whole = step(half, tiny.base)
    store = Checkpoints(tmp_path / "run")
    store.save(3, half)
    store.close()
    again = Checkpoints(tmp_path / "run")
    resumed = step(again.restore(run), tiny.base)
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
