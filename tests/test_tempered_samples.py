"""Which methods keep their fixed point when samples are drawn at another temperature than 1."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_families import BETA, METHODS, at_fixed_point, ipo_law, source_for

from kl_rl import exact
from kl_rl.core.posterior import Posterior
from kl_rl.experiments.compare.catalogue import CATALOGUE
from kl_rl.runs.methods import TAKES_SAMPLES_AS_DRAWN

CORRECTED = {
    "reinforce", "reward_weighted", "vargrad", "trajectory_balance", "subtrajectory_balance", "path_consistency",
    "alpha_divergence", "dpo",
}  # fmt: skip
ROWS = {  # of the catalogue -> of the table of families
    "rloo": "reinforce", "ppo": "ppo", "grpo": "grpo", "filter": "filtered", "best-of-n": "best_of_n",
    "rwr": "reward_weighted", "rwr-logged": "reward_weighted", "expert-iteration": "expert_iteration",
    "dt-tilted": "decision_transformer", "dt-max": "decision_transformer", "dt-quantile": "decision_transformer",
    "vargrad-replay": "vargrad", "vargrad-logged": "vargrad", "tb-replay": "trajectory_balance",
    "subtb-replay": "subtrajectory_balance", "pcl-replay": "path_consistency", "alpha-0.5": "alpha_divergence",
    "alpha-1": "alpha_divergence", "dpo": "dpo", "ipo": "ipo",
}  # fmt: skip


OFTEN = {"ppo", "best_of_n", "reward_weighted", "alpha_divergence", "dpo"}
SELDOM = sorted(
    METHODS.keys() - OFTEN - {"ipo", "expert_iteration"}
)  # IPO is below; the other is as best-of-n


@pytest.mark.parametrize("name", [*sorted(OFTEN), *(pytest.param(n, marks=pytest.mark.slow) for n in SELDOM)])
def test_fixed_points_under_tempered_samples(name, tiny):
    """Mean update at the fixed point for samples at temperature 0.6: zero within its standard error, or clearly not.

    A table's logits divided by T are the table of the tempered policy.
    """
    algorithm, state, evidence = at_fixed_point(name, tiny, optax.sgd(1.0))
    posterior, source = Posterior(tiny.base, evidence), source_for(name, tiny, 1024)
    behaviour = algorithm.behaviour(state, posterior)
    tempered = behaviour.with_params(behaviour.params / 0.6)

    def update(key):
        batch, _ = source.draw((), key, tempered)
        new, _ = algorithm.step(state, posterior, batch)
        leaves = zip(*(jax.tree.leaves((s.policy.params, s.twist)) for s in (new, state)), strict=True)
        change = jnp.concatenate([(a - b).reshape(-1) for a, b in leaves])
        return jnp.where(jnp.isfinite(change), change, 0.0)

    updates = np.asarray(jax.jit(jax.vmap(update))(jax.random.split(jax.random.key(7), 96)))
    mean, stderr = updates.mean(0), updates.std(0, ddof=1) / np.sqrt(len(updates))
    sizes = np.abs(mean) - 1e-10  # less is rounding
    assert np.all(sizes < 4.5 * stderr) if name in CORRECTED else np.any(sizes > 8 * stderr)


def test_the_target_of_ipo_follows_its_opponents(tiny):
    """Its law is p0 tilted by the rate of wins against whoever draws; in these worlds it hardly moves."""

    def law(log_opponent):
        win = jax.nn.sigmoid(tiny.reward[:, None] - tiny.reward[None, :]) @ jnp.exp(log_opponent)
        return exact.log_posterior(tiny.log_base, win / BETA)

    np.testing.assert_allclose(law(tiny.log_base), ipo_law(tiny), rtol=1e-10)
    tempered = tiny.law(tiny.base.with_params(tiny.base.params / 0.6))
    assert exact.kl_divergence(law(tiny.log_base), law(tempered)) > 1e-9


def test_train_refuses_a_temperature_where_it_would_move_the_target():
    names = {method.name for method in CATALOGUE}
    assert set(ROWS) == names - {"rloo-free"}  # which has no fixed point to keep
    assert TAKES_SAMPLES_AS_DRAWN == {"rloo-free"} | {
        row for row, name in ROWS.items() if name not in CORRECTED
    }
