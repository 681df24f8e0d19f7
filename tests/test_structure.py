"""The shape of the library: rooms and their order, public names, docstrings, no constants in programs."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kl_rl

PACKAGE = Path(kl_rl.__file__).parent
MODULES = sorted(p.relative_to(PACKAGE).with_suffix("").as_posix() for p in PACKAGE.rglob("*.py"))

ROOMS = sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists())
STUBS = sorted(PACKAGE.rglob("__init__.pyi"))


def lint(folder: Path) -> subprocess.CompletedProcess:
    """The contracts of pyproject.toml on the package in a folder."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("place", "line", "contract"),
    [
        ("core/numerics.py", "from kl_rl.methods import fit", "Imports between rooms go down only BROKEN"),
        ("attic/__init__.py", "", "Imports between rooms go down only"),
        ("exact/laws.py", "import flax", "flax lives in the networks and in the one crossing from it BROKEN"),
        ("", "", None),
    ],
    ids=["upward", "no place", "flax", "as it is"],
)
def test_the_contracts_hold_and_can_be_broken(place, line, contract, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "kl_rl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PACKAGE.parent / "pyproject.toml", tmp_path)
    if place:
        (tmp_path / "kl_rl" / place).parent.mkdir(exist_ok=True)
        with open(tmp_path / "kl_rl" / place, "a") as file:
            file.write(f"{line}\n")
    done = lint(tmp_path)
    assert done.returncode == (1 if place else 0), done.stdout
    assert contract is None or contract in done.stdout


def public_names(stub: Path) -> dict[str, str]:
    """Name -> module of everything that a stub lists."""
    package = ".".join(("kl_rl", *stub.parent.relative_to(PACKAGE).parts))
    found = {}
    for node in ast.parse(stub.read_text()).body:
        assert isinstance(node, ast.ImportFrom) and node.level == 1
        found |= {alias.name: f"{package}.{node.module or alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("stub", STUBS, ids=lambda p: p.parent.relative_to(PACKAGE.parent).as_posix())
def test_every_public_name_is_there_and_documented(stub):
    package = importlib.import_module(".".join(stub.parent.relative_to(PACKAGE.parent).parts))
    names = public_names(stub)
    assert sorted(names) == sorted(package.__all__), "a name stands twice"
    for name, home in names.items():
        value = getattr(package, name)
        if inspect.ismodule(value):
            assert value.__name__ == home
            continue
        assert value is getattr(importlib.import_module(home), name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__ and len(value.__doc__) > 20, f"{name} needs a docstring"


def test_every_room_has_a_stub_and_is_public():
    assert {s.parent.name for s in STUBS if s.parent.parent == PACKAGE} == set(ROOMS) - {"cli"}
    assert set(ROOMS) - {"cli"} <= set(kl_rl.__all__)


SPELLED = re.compile(r"`(kl_rl(?:\.\w+)+)")


def test_every_name_spelled_in_a_docstring_resolves():
    """On a fresh import, as a reader would try it."""
    spelled = {}
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                spelled |= {name: module for name in SPELLED.findall(ast.get_docstring(node) or "")}
    for file in ("README.md", "CONTRIBUTING.md"):
        spelled |= {name: file for name in SPELLED.findall((PACKAGE.parent / file).read_text())}
    code = "import sys, kl_rl\nfor name in sys.argv[1:]:\n    eval(name)"
    done = subprocess.run([sys.executable, "-c", code, *spelled], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stderr, spelled)
    assert len(spelled) > 5


def test_numpy_only_measurement_starts_without_jax():
    code = (
        "import sys, kl_rl.measure.calibration, kl_rl.measure.samples, kl_rl.cli; "
        "kl_rl.cli.build_parser(); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_import_is_cheap():
    code = "import sys, kl_rl; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError):
        _ = kl_rl.no_such_name


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__")])
def test_every_file_says_what_it_is(module):
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
