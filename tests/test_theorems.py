"""Theory, tests and code are one: every statement has a test, every test a statement, every reference a target."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTES = sorted((ROOT / "theory_notes").glob("*.md"))
HEADING = re.compile(r"^### ([TC]\d+\.\d+) (.+)$", re.MULTILINE)
REFERENCE = re.compile(r"\b[TC]\d+\.\d+\b")
ROW = re.compile(r"^\| ([TC]\d+\.\d+) \| (.+?) \| (.+?) \|$", re.MULTILINE)
PARTS = {
    "T": ["**Statement.**", "**Assumptions.**", "**Proof.**", "**Where used.**", "**Source.**"],
    "C": ["**Statement.**", "**Breaks.**"],
}


def sections() -> dict[str, str]:
    """The text of every statement by its id."""
    found: dict[str, str] = {}
    for path in NOTES:
        parts = HEADING.split(path.read_text("utf-8"))[1:]
        for name, _, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            assert name not in found, f"{name} is stated twice, the second time in {path.name}"
            found[name] = body
    return found


def marked_tests() -> dict[str, set[str]]:
    """`file::function` of every test that carries a theorem mark, by id, read without importing."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.theorem":
                    for argument in mark.args:
                        label = f"{path.relative_to(ROOT / 'tests').as_posix()}::{node.name}"
                        found.setdefault(ast.literal_eval(argument), set()).add(label)
    return found


def test_statements_and_tests_are_the_same_set():
    stated, tested = set(sections()), set(marked_tests())
    assert not stated - tested, f"statements without a test: {sorted(stated - tested)}"
    assert not tested - stated, f"tests of nothing stated: {sorted(tested - stated)}"
    assert stated


def test_every_id_named_in_the_library_is_stated():
    stated = set(sections())
    unknown = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "kl_rl").rglob("*.py")
        for name in set(REFERENCE.findall(path.read_text("utf-8"))) - stated
    }
    assert not unknown, f"references to statements that do not exist: {sorted(unknown)}"


@pytest.mark.parametrize("path", NOTES, ids=lambda path: path.stem)
def test_every_id_named_in_a_note_is_stated(path):
    unknown = set(REFERENCE.findall(path.read_text("utf-8"))) - set(sections())
    assert not unknown, f"{path.name} refers to {sorted(unknown)}"


def test_every_section_has_its_parts():
    missing = [
        f"{name}: {part}" for name, body in sections().items() for part in PARTS[name[0]] if part not in body
    ]
    assert not missing, missing


def test_the_index_lists_every_statement_with_its_tests():
    rows = {
        name: tests
        for name, _, tests in ROW.findall((ROOT / "theory_notes" / "README.md").read_text("utf-8"))
    }
    expected = {name: {label.rsplit("::")[-1] for label in labels} for name, labels in marked_tests().items()}
    listed = {name: set(re.findall(r"`(test_\w+)`", tests)) for name, tests in rows.items()}
    assert listed == expected


def resolves(dotted: str) -> bool:
    """Whether kl_rl.<dotted> is a module or an attribute of one."""
    parts = dotted.split(".")
    for cut in range(len(parts), -1, -1):
        try:
            target = importlib.import_module(".".join(["kl_rl", *parts[:cut]]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            if not hasattr(target, name):
                return False
            target = getattr(target, name)
        return True
    return False


def test_functions_named_under_where_used_exist():
    gone = []
    for name, body in sections().items():
        used = re.search(r"\*\*Where used\.\*\*(.+?)(?:\n\n|\Z)", body, re.DOTALL)
        names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", used[1]) if used else []
        assert names or name.startswith("C"), f"{name} names no function under 'Where used'"
        gone += [f"{name}: {dotted}" for dotted in names if not resolves(dotted)]
    assert not gone, gone
