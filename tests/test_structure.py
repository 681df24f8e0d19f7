"""The shape of the library: layers by imports, the public interface, docstrings, no constants in programs."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import kl_rl

PACKAGE = Path(kl_rl.__file__).parent
MODULES = sorted(p.relative_to(PACKAGE).with_suffix("").as_posix() for p in PACKAGE.rglob("*.py"))

# Lower number: further down. A module imports from its own layer or below; leaves are imported by leaves only.
LAYERS = {
    0: "core  objectives ".split(),
    1: "      ".split(),
    2: "methods".split(),
    3: "exact".split(),
    4: "measure".split(),
    5: "models worlds sharding storage raters rewards huggingface tokenizer data runs report experiments cli".split()
    + ["__main__", "__init__"],
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
CONFINED = {
    "flax": {"models", "core"},
    "orbax": {"storage"},
    "numpyro": {"raters"},
    "matplotlib": {"report"},
    "chex": set(),
    "grain": {"data"},
    "pyarrow": {"data"},
    "tokenizers": {"tokenizer"},
    "torch": set(),
    "transformers": set(),
}


def room(module: str) -> str:
    return module.split("/")[0]


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    assert room(module) in LAYER_OF, f"{module}: give it a layer in tests/test_structure.py"
    own = LAYER_OF[room(module)]
    for name in imports(PACKAGE / f"{module}.py"):
        parts = name.split(".")
        if parts[0] == "kl_rl" and len(parts) > 1 and parts[1] in LAYER_OF:
            assert LAYER_OF[parts[1]] <= own, f"{module} (layer {own}) imports {name}"
        if parts[0] in CONFINED:
            assert room(module) in CONFINED[parts[0]], f"{module} imports {name}"


def test_numpy_only_measurement_starts_without_jax():
    code = (
        "import sys, kl_rl.measure.calibration, kl_rl.measure.samples, kl_rl.cli; "
        "kl_rl.cli.build_parser(); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PUBLIC = """
Algorithm Estimate Info Interval Policy Posterior Samples Source State Threshold Tilt Trajectories
Transform advance alpha_divergence best_of_n sampled_budget comparisons decision_transformer dpo
enumerate_strings expert_iteration filtered fit_likelihood fresh from_nnx generate gradient_algorithm grpo
ipo log_prob logged mixture path_consistency ppo read_samples reinforce replay reward_levels
reward_weighted sample score sequence_log_prob start subtrajectory_balance trajectory_balance
vargrad
""".split()


def test_public_interface_is_frozen():
    assert [name for name in kl_rl.__all__ if not inspect.ismodule(getattr(kl_rl, name))] == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(kl_rl, name) is not None
    with pytest.raises(AttributeError):
        _ = kl_rl.no_such_name


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__")])
def test_every_public_name_is_documented(module):
    name = "kl_rl." + module.replace("/", ".").removesuffix(".__init__").removesuffix("__init__")
    loaded = importlib.import_module(name.rstrip("."))
    assert loaded.__doc__
    for public in getattr(loaded, "__all__", ()):
        value = getattr(loaded, public)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__ and len(value.__doc__) > 20, f"{name}.{public} needs a docstring"


def test_files_stay_small():
    long = {m: n for m in MODULES if (n := (PACKAGE / f"{m}.py").read_text().count("\n")) > 350}
    assert not long


def test_no_weights_are_baked_into_a_program():
    """A method trained on a base of 2**20 parameters compiles to a program far smaller than its weights."""
    import jax
    import jax.numpy as jnp
    import optax

    from kl_rl import Posterior, Tilt, advance, fresh, reinforce, start
    from kl_rl.models import table_policy

    base = table_policy(jax.random.key(0), 31, 4)
    assert base.params.size > 2**20
    source = fresh(jnp.array([[31]]), lambda p, t, m: t.sum(-1).astype(float), num_samples=4, horizon=3)
    algorithm = reinforce(optimizer=optax.sgd(0.1))
    run = start(algorithm, base, Posterior(base, Tilt(1.0)), source, jax.random.key(1))
    lowered = jax.jit(lambda run, posterior: advance(algorithm, run, posterior, source, num_steps=2)).lower(
        run, Posterior(base, Tilt(1.0))
    )
    assert len(lowered.as_text()) < 2**19
