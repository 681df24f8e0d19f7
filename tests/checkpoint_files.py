"""The small stored checkpoints and what the tests of Hugging Face folders do with them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.models.config import Execution
from kl_rl.models.decoder import forward

HERE = Path(__file__).parent / "checkpoints"
FOLDERS = sorted(path.parent.name for path in HERE.glob("*/config.json"))


jitted = jax.jit(forward, static_argnums=(0, 1))


def logits(config, weights, ids):
    return np.asarray(jitted(config, Execution(), weights, jnp.asarray(ids)))


def spec_of(name):
    return json.loads((HERE / name / "config.json").read_text())


def weight_files(folder):
    return {
        p.name: p.read_bytes()
        for p in Path(folder).iterdir()
        if ".safetensors" in p.name or p.name == "config.json"
    }


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
