"""Conditional models: what is exported is sampled with the prompt it was trained on, return token in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_rl.core.rollouts import score
from kl_rl.core.streaming import stream
from kl_rl.core.trajectories import Trajectories
from kl_rl.core.transform import Transform
from kl_rl.models import DecoderConfig, decoder_policy, init_weights
from kl_rl.runs.prompts import with_place
from kl_rl.runs.returns import deployed_policy, write_returns
from kl_rl.storage.errors import RunError

BEGIN, FIRST, RETURNS, HORIZON = 11, 12, 3, 6


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """A mixture over return tokens, written and opened again."""
    folder = tmp_path_factory.mktemp("conditional")
    config = DecoderConfig.gpt2(BEGIN, width=16, layers=1, heads=2, context=40, extra=1 + RETURNS)
    weights = jax.tree.map(lambda x: 5.0 * x, init_weights(jax.random.key(0), config))
    write_returns(folder, FIRST, np.log([0.5, 0.3, 0.2]), np.array([0.0, np.inf]))
    base = decoder_policy(config, weights)
    policy = deployed_policy(folder, base)
    assert policy is not base
    return policy


@pytest.mark.parametrize("begin", [BEGIN, None])
@pytest.mark.parametrize("size", [3, 15, 16, 17])
def test_samples_are_scored_as_in_training(begin, size, deployed):
    """In training prompts are padded on the right and the place of the return token is column 0."""
    text = [1 + i % 7 for i in range(size)]
    ids = with_place(text if begin is None else [begin, *text], begin)
    as_trained = np.array([[*ids, -1, -1, -1]], np.int32)
    assert as_trained[0, 0] == (-1 if begin is None else BEGIN)
    for drawn in stream(deployed, jax.random.key(1), [ids], num_samples=2, horizon=HORIZON):
        tokens = np.zeros((1, 1, HORIZON), np.int32)
        tokens[0, 0, : len(drawn.tokens)] = drawn.tokens
        ones = np.ones(tokens.shape, np.float32)
        batch = Trajectories(jnp.asarray(as_trained), tokens, ones, ones, 0 * ones, ones[..., 0])
        np.testing.assert_allclose(score(deployed, batch)[0, 0], drawn.log_model, atol=1e-5)


def test_a_prompt_without_its_begin_mark_has_no_place():
    with pytest.raises(RunError, match="this prompt does not begin with it"):
        with_place([3, 4], BEGIN)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Transform(top_k=0), "top_k must be at least 1; got 0"),
        (Transform(top_p=0.0), r"top_p must lie in \(0, 1\]; got 0.0"),
        (Transform(top_p=1.5), r"top_p must lie in \(0, 1\]; got 1.5"),
        (Transform(temperature=-1.0), "temperature must be at least 0 and finite; got -1.0"),
        (Transform(temperature=float("nan")), "temperature must be at least 0 and finite; got nan"),
        (Transform(force_end=True), "force_end needs a stop token"),
    ],
)
def test_streams_refuse_transforms_out_of_range(transform, message, deployed):
    with pytest.raises(ValueError, match=message):
        next(stream(deployed, jax.random.key(0), [[BEGIN, 1]], horizon=2, transform=transform))


@pytest.mark.parametrize("force", [True, False])
def test_an_end_is_forced_in_streams_too(force, deployed):
    options = {"num_samples": 8, "horizon": 3, "transform": Transform(force_end=force), "stop": (0,)}
    found = list(stream(deployed, jax.random.key(0), [[BEGIN, 1]], **options))
    assert all(c.stopped for c in found) == force
