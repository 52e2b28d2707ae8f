"""The kit catches wrong reports: one broken report for each promise."""

from __future__ import annotations

import random
import time
from pathlib import Path

import attrs
import pytest

from moediff.errors import WorkdirError
from moediff.testing import check_report
from tests.testing.catching import caught


@attrs.frozen
class Reporting:
    """A report of a line, which can be spoilt."""

    spoil: str = ""

    def write(self, folder: Path) -> Path:
        plan, path = folder / "plan.json", folder / "report.txt"
        if self.spoil == "leaving":
            path.touch()
        if self.spoil != "anything" and not plan.is_file():
            raise WorkdirError(f"{folder}: holds no finished run.")
        match self.spoil:
            case "elsewhere":
                path = folder.parent / "report.txt"
            case "altering":
                plan.write_text("{}")
            case "clock":
                path.write_text(str(time.perf_counter()))
                return path
            case "seed":
                random.seed(0)
        path.write_text("a line")
        return path


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("elsewhere", "writes into the run's folder"),
        ("altering", "leaves what the run wrote alone"),
        ("clock", "the same seed gives the same result"),
        ("seed", "leaves random's global state as found"),
        ("anything", "refuses a folder without a finished run"),
        ("leaving", "leaves nothing where it refused"),
    ],
)
def test_wrong_reports_are_caught(spoil: str, message: str) -> None:
    caught(check_report, Reporting(spoil), message)


def test_a_good_report_passes() -> None:
    check_report(Reporting())
