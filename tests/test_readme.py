"""The README keeps its word: its Python runs, and it names every hook and built-in strategy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import moediff
from moediff.registry import HOOKS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_every_hook_and_built_in_name_is_documented() -> None:
    named = set(re.findall(r"`([^`\n]+)`", README))
    assert set(HOOKS) <= named
    for hook in HOOKS:
        assert set(moediff.installed().names(hook)) <= named, hook


def test_the_pictures_exist() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


@pytest.mark.slow
def test_the_snippets_run_one_after_the_other(tmp_path: Path) -> None:
    assert len(SNIPPETS) >= 3
    script = "\n".join(SNIPPETS)
    command = [sys.executable, "-W", "error::UserWarning", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
