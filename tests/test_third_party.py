"""A stranger's plugin: built, installed, found by its entry point, and checked by the kit."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "third_party_plugin"

USE = """
import attrs, moediff
from moediff.testing import check_strategy, tiny_subject, tiny_task, tiny_run
found = moediff.installed()
print("deepest" in found.names("scorers"), found.broken)
print(found.entries["scorers", "deepest"][0].distribution)
strategy = found.create("scorers", "deepest", {"power": 2.0})
check_strategy("scorers", strategy)
values = strategy.score(tiny_subject(), tiny_task(), tiny_run()).values
print(bool((values.diff() > 0).all()))
recipe = moediff.load_recipe("moedm", scorer="deepest", recover=None)
print(type(recipe.scorer).__module__)
"""


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_example_is_installed_found_and_conforms(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for file in EXAMPLE.glob("*.*"):
        (source / file.name).write_bytes(file.read_bytes())
    # Everything that the build needs is installed already: no network.
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "install", *options, "--target", str(target), str(source))
    assert sorted(f.name for f in target.glob("*.py")) == ["moediff_deepest.py"]
    lines = run("-c", USE, PYTHONPATH=str(target)).splitlines()
    assert lines == ["True {}", "moediff-deepest", "True", "moediff_deepest"]


def test_the_example_is_small() -> None:
    files = [f for f in EXAMPLE.iterdir() if f.is_file()]
    assert sorted(f.name for f in files) == ["moediff_deepest.py", "pyproject.toml"]
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["moediff"] == {"moediff-deepest": "moediff_deepest"}
    assert len((EXAMPLE / "moediff_deepest.py").read_text().splitlines()) <= 30
