"""The rules of the house, executed: lint, formatting, types, and who may import whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dlf_ray import rules

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dlf_ray"
LIBRARIES = {
    "ray": {"bench", "engine.actors", "engine.capacity", "engine.checks", "engine.engine"}
    | {"engine.placement", "serving.app", "serving.experts", "serving.http"},
    "fastapi": {"serving.http"},
    "starlette": {"serving.app", "serving.guard", "serving.http"},
    "pydantic": {"serving"},
    "zmq": {"bench", "engine.transport"},
    "transformers": {"bench_backends", "models", "training.demo", "training.train"},
    "vllm": {"bench_backends", "models.inspect", "models.vllm_extension", "models.vllm_runner"},
    "gguf": {"models.gguf"},
    "peft": {"bench_backends", "models.adapters", "models.merging"},
    "typer": {"cli"},
    "llguidance": {"decoding.structured"},
    "datasets": {"evaluation.tasks.data"},
    "rouge_score": {"evaluation.tasks.common"},
    "pyarrow": {"evaluation"},
    "jinja2": {"evaluation.report"},
}
"""Libraries that only the named modules, or the modules of the named rooms, may import."""


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=" ".join,
)
def test_lint_and_types(command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr


def table():
    """The README's table of rooms: what each may import of the package beside itself."""
    rows = re.findall(r"^  (\w+)(?:\.py|/) .*<- (.+)$", (ROOT / "README.md").read_text(), re.M)
    return {name: set() if allowed == "-" else set(allowed.split()) for name, allowed in rows}


def imported(path):
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: import by the full name"
            yield node.module
            if node.module == "dlf_ray":
                yield from (f"dlf_ray.{alias.name}" for alias in node.names)


def modules():
    """What every module imports, by its name inside the package ("tasks.data")."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): set(imported(path))
        for path in PACKAGE.rglob("*.py")
    }


def rooms():
    """What every folder, and every module above them, imports of the rest of the package."""
    found = {}
    for name, names in modules().items():
        room = name.split(".")[0]
        if room == "__init__":  # what users import stands above everything
            continue
        own = {each.split(".")[1] for each in names if each.startswith("dlf_ray.")}
        found.setdefault(room, set()).update(own - {room})
    return found


def test_the_readme_lists_every_room():
    assert set(table()) == set(rooms())


def test_every_room_names_its_files():
    for init in PACKAGE.glob("*/__init__.py"):
        said = ast.get_docstring(ast.parse(init.read_text())) or ""
        names = {path.stem for path in init.parent.glob("*.py")} - {"__init__"}
        missing = {name for name in names if f"`{name}`" not in said}
        assert not missing, f"{init.parent.name} does not say what {missing} are"


@pytest.mark.parametrize("name", sorted(rooms()))
def test_nothing_imports_upward(name):
    own = rooms()[name]
    allowed = table()[name]
    assert own <= allowed, f"{name} imports {own - allowed}, which the README does not allow"
    assert allowed <= own, f"{name} does not import {allowed - own}, as the README says"


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_stay_where_they_belong(library):
    users = {
        name
        for name, names in modules().items()
        if any(each.split(".")[0] == library for each in names)
    }
    allowed = LIBRARIES[library]
    assert {name for name in users if name.split(".")[0] not in allowed} <= allowed


@pytest.mark.parametrize("kind", ["rule", "select"])
def test_the_readme_shows_the_table_of(kind):
    rows = {"rule": rules.RULES, "select": rules.SELECTS}[kind]
    shown = re.findall(rf"^\| `{kind}: (\w+)` \| (.+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert dict(shown) == {name: f"{row.about} ({row.paper})" for name, row in rows.items()}


def test_the_top_level_is_the_one_agreed():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.splitlines()}
    agreed = {"pyproject.toml", "cluster", "dlf_ray", "jobs", "tests", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= agreed
