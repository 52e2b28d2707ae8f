"""The examples run as a user runs them, with quick settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(tmp_path: Path, name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), "--out", str(tmp_path / "out"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_quickstart_is_short_and_runs(tmp_path):
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) <= 40
    assert "expert 1 of 2, output (1, 1, 8, 8)" in run(tmp_path, "quickstart.py", "--steps", "4")
    assert (tmp_path / "out" / "mixture.safetensors").exists()


@pytest.mark.slow
def test_moedm(tmp_path):
    printed = run(tmp_path, "moedm.py", "--steps", "4", "--noises", "1", "--samples", "80")
    assert "MoEDM: FD[digits]" in printed
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["copies"]["*"] == [0, 0]
    assert plan["blueprints"][0]["drop"] == plan["blueprints"][1]["drop"] != []


@pytest.mark.slow
def test_diffpruning(tmp_path):
    quick = ("--steps", "8", "--era-steps", "4", "--images", "4", "--samples", "80")
    printed = run(tmp_path, "diffpruning.py", *quick)
    assert "DiffPruning: FD[digits]" in printed
    share = float(printed.split(", ")[-1].split(" of the base")[0].split()[-1])
    assert 0.495 <= share <= 0.5
    assert 1 <= int(printed.split("images support: ")[1].split()[0]) <= 8
