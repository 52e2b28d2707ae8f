"""The house: imports run one way, files stay small, and nothing lies about at the top."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core" / "moediff"
PLUGINS = ROOT / "plugins" / "moediff_plugins"

ORDER = (
    "errors",
    "storage",
    "timesteps",
    "anatomy",
    "sampling",
    "images",
    "plan",
    "space",
    "subject",
    "task",
    "denoising",
    "cost",
    "allowance",
    "surgery",
    "masking",
    "workdir",
    "roles",
    "hookspecs",
    "registry",
    "artefact",
    "mixture",
    "recipe",
    "recipefile",
    "given",
    "stages",
    "engine",
    "modelfile",
    "cli",
    "testing",
)
"""Every core module imports earlier ones only; DESIGN's arrows are all in this order."""

TOP = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "benchmarks",
    "constraints.txt",
    "core",
    "examples",
    "plugins",
    "pyproject.toml",
    "tests",
}

VERBS = {
    "allocate",
    "cluster",
    "count",
    "dissect",
    "measure",
    "prepare",
    "prune",
    "recover",
    "score",
    "write",
}

MODULES = sorted(CORE.rglob("*.py"))
STRATEGIES = sorted(f for f in PLUGINS.glob("*/*.py") if f.name != "__init__.py")


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: nothing says which files belong to the repository")
    return [Path(line) for line in listed.stdout.splitlines()]


def imports(file: Path, while_running: bool = False) -> set[str]:
    """The modules that a file imports; `while_running` leaves out those for type checkers only."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and while_running:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where a name comes from"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(file.read_text(encoding="utf-8")))
    return found


def core_name(file: Path) -> str:
    parts = file.relative_to(CORE).with_suffix("").parts
    return parts[0]


def test_every_core_module_has_its_place() -> None:
    assert {core_name(file) for file in MODULES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(CORE)))
def test_the_core_imports_one_way_and_no_plugin(file: Path) -> None:
    names = imports(file, while_running=True)
    assert not [
        n for n in imports(file) if n.split(".")[0] in ("moediff_plugins", "plugins", "core")
    ]
    own = core_name(file)
    if own == "__init__":
        return
    used = {n.split(".")[1] for n in names if n.startswith("moediff.") and n.count(".")} & set(
        ORDER
    )
    later = [name for name in used - {own} if ORDER.index(name) > ORDER.index(own)]
    assert not later, f"{own} imports {later}, which stand above it"


def defines_strategy(file: Path) -> bool:
    classes = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)]
    return any(
        isinstance(member, ast.FunctionDef) and member.name in VERBS
        for cls in classes
        for member in cls.body
    )


@pytest.mark.parametrize("file", STRATEGIES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_no_strategy_imports_another(file: Path) -> None:
    for name in imports(file):
        target = PLUGINS.joinpath(*name.split(".")[1:]).with_suffix(".py")
        if name.startswith("moediff_plugins.") and target.exists():
            assert not defines_strategy(target), f"{file.name} imports the strategy {name}"
            assert target != PLUGINS / "hooks.py"


@pytest.mark.parametrize("file", STRATEGIES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_one_strategy_per_file_and_no_inheritance(file: Path) -> None:
    classes = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)]
    strategies = [
        cls
        for cls in classes
        if any(isinstance(m, ast.FunctionDef) and m.name in VERBS for m in cls.body)
    ]
    assert len(strategies) <= 1
    for cls in strategies:
        assert not cls.bases, f"{cls.name} inherits; share by plain functions"
        decorators = [ast.unparse(decorator) for decorator in cls.decorator_list]
        assert decorators == ["attrs.frozen"]
        assert ast.get_docstring(cls)


def test_strategies_are_found_where_there_are_any() -> None:
    wings = {file.parent.name for file in STRATEGIES if defines_strategy(file)}
    assert wings == {
        "anatomies", "clusterers", "counters", "gates", "metrics", "pruners", "reports", "scorers",
        "tuners",
    }  # fmt: skip


ELSEWHERE = {
    "cli": "tests/test_cli.py",
    "errors": "wherever one is raised",
    "hookspecs": "test_registry.py",
    "modelfile": "tests/test_cli.py",
    "roles": "test_registry.py and test_recipe.py",
    "testing": "tests/testing",
}
"""Core modules without a test file of their own name, and where they are tested."""


def test_the_tests_mirror_the_core() -> None:
    named = {f.stem.removeprefix("test_") for f in (ROOT / "tests" / "core").glob("test_*.py")}
    assert named | set(ELSEWHERE) == set(ORDER)
    assert not named & set(ELSEWHERE)


def test_the_source_roots_are_no_packages() -> None:
    assert not (ROOT / "core" / "__init__.py").exists()
    assert not (ROOT / "plugins" / "__init__.py").exists()
    assert {f.name for f in (ROOT / "core").iterdir() if f.is_dir()} - {"__pycache__"} == {
        "moediff"
    }


def test_the_top_level_holds_only_what_belongs_there() -> None:
    assert {file.parts[0] for file in tracked()} <= TOP


def test_everything_is_small_enough_to_read_at_once() -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for file in MODULES
        if (lines := sum(bool(line.strip()) for line in file.read_text().splitlines())) >= 300
    }
    assert not long, "a file that outgrows 300 lines (blank ones aside) usually holds two ideas"
    assert len((CORE / "hookspecs.py").read_text().splitlines()) <= 60


def test_init_is_imports_and_a_sorted_list() -> None:
    import moediff

    assert moediff.__all__ == sorted(moediff.__all__)
    for file in (CORE / "__init__.py", CORE / "testing" / "__init__.py"):
        body = ast.parse(file.read_text()).body[1:]
        assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign) for node in body)
    assert all(hasattr(moediff, name) for name in moediff.__all__)


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    told = ("/ho" + "me/", "/wo" + "rk/", "/tm" + "p/")
    for file in tracked():
        if file.suffix in {".py", ".toml", ".md", ".txt", ""} and (ROOT / file).is_file():
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not [place for place in told if place in text], file
