"""The house: what lies at the top, who imports whom, and that every option is read."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = {"corrupt", "train_qp", "train_ssl", "evaluate"}
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("data/*.py")]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependency_rule(path):
    """data/ imports nothing of ours, models/ may import data/, a script those two and no script."""
    allowed = {"data": {"data"}}.get(path.parent.name, {"models", "data"})
    assert set(imported(path)) & ({"models", "data"} | STAGES) <= allowed


def test_processes_that_score_import_numpy_and_scipy_alone():
    assert set(imported(ROOT / "data" / "metrics.py")) == {
        "dataclasses",
        "math",
        "numpy",
        "scipy",
        "typing",
    }


def test_top_level_holds_what_the_design_lists():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    allowed = {f"{s}.py" for s in STAGES} | {
        "models",
        "data",
        "tests",
        "results",
        "Makefile",
        "requirements.txt",
        "ruff.toml",
        "README.md",
        "README.zh.md",
        "METHOD.md",
        "LICENSE",
        ".ci",
        ".gitignore",
    }
    assert {name.split("/")[0] for name in tracked if name} <= allowed


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if "add_argument" in p.read_text()], ids=lambda p: p.name
)
def test_every_option_is_read(path):
    source = (
        path.read_text()
        + (ROOT / "models" / "checkpoints.py").read_text()  # --resume and --overwrite
        + (ROOT / "models" / "inference.py").read_text()  # --window, --stride and --blend
    )
    for option in re.findall(r'add_argument\(\s*"(?:--)?([\w-]+)"', source):
        assert re.search(rf"\bargs\.{option.replace('-', '_')}\b", source), (
            f"{path.name}: --{option} is read nowhere"
        )


def test_importing_a_script_parses_nothing_and_needs_no_display():
    code = (
        "import sys; sys.argv = ['x', '--nonsense']\n"
        "import corrupt, train_qp, train_ssl, evaluate\n"
        "assert 'matplotlib' not in sys.modules"
    )
    from conftest import python

    done = python("-c", code)
    assert done.returncode == 0, done.stderr
