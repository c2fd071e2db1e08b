"""Where things stand, and which way imports point: `pytest tests/test_house.py`."""

import ast
import subprocess
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT

COMMANDS = {"sft_training", "reward_modeling", "dpo_training", "ppo_training", "merge_peft_adapter", "evaluate_model"}
COMMANDS |= {"prepare_data"}
# what each wing may import of the house, beside itself, user_error and processes
MAY_IMPORT = {"data": set(), "models": set(), "ppo": {"models"}, "evaluation": {"models"}, "runs": {"models"}}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("rlhf/**/*.py")]
}


def imports(name: str) -> set[str]:
    """All modules that a file names in import statements, wherever in it they stand."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (within & FILES.keys()) or {node.module}
    return found


def wing(name: str) -> str | None:
    return name.split(".")[1] if name.count(".") == 2 else None


def test_the_top_is_what_a_user_types():
    assert {path.stem for path in ROOT.glob("*.py")} == COMMANDS
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what is tracked cannot be told")
    tracked = subprocess.check_output(["git", "ls-tree", "--name-only", "HEAD"], cwd=ROOT, text=True).split()
    texts = {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "pyproject.toml"}
    texts |= {f"requirements{kind}.txt" for kind in ("", "-dev", "-extra")}
    folders = {"rlhf", "configs", "accelerate_config", "examples", "benchmarks", "docs", "tests"}
    assert {name for name in tracked if not name.startswith(".")} == texts | folders | {f"{c}.py" for c in COMMANDS}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    house = imports(name) & FILES.keys() - {"rlhf.user_error", "rlhf.processes"}
    if name in COMMANDS:
        assert not house & (COMMANDS - {"prepare_data"}), "a script imports no script"
        if name == "prepare_data":
            assert {wing(other) for other in house} <= {"data", "models"}
    else:
        assert not house & COMMANDS and all(wing(other) for other in house)
        assert {wing(other) for other in house} <= {wing(name)} | MAY_IMPORT.get(wing(name), set())
    if wing(name) == "data" or name in ("rlhf", "rlhf.user_error"):
        known = {other.split(".")[0] for other in imports(name)}
        assert not known & {"torch", "transformers", "trl", "peft", "accelerate"}, "rows know no model"


def test_imports_go_in_no_circle():
    order = TopologicalSorter({name: imports(name) & FILES.keys() for name in FILES})
    assert len(list(order.static_order())) == len(FILES)  # raises a CycleError where there is one


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_wing_says_what_it_knows_and_nothing_else(name):
    tree = ast.parse((ROOT / "rlhf" / name / "__init__.py").read_text())
    text = ast.get_docstring(tree)
    assert len(tree.body) == 1 and 5 <= len(text.splitlines()) <= 10
    assert "Knows" in text and "Must not" in text and "Read in this order" in text
    for path in (ROOT / "rlhf" / name).glob("[!_]*.py"):
        assert path.stem in text, f"{path.name} is not named"
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} >= {name}


def test_ppo_can_be_held_in_the_head():
    for path in (ROOT / "rlhf" / "ppo").glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{path.name}: {node.name}"
