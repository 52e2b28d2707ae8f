"""The kit as a whole: the check of each hook, the tiny models, no test framework."""

from __future__ import annotations

import subprocess
import sys
import time

import attrs
import pytest
from torch import nn

from moediff import Measurement, Run, Subject, Task
from moediff.errors import UnknownNameError
from moediff.testing import ConformanceError, check_strategy, tiny_subject
from moediff.testing.tiny import tiny_space
from tests.core.toys import CALLS, Draw, Nudge
from tests.testing.catching import units


@attrs.frozen
class Clock:
    """A metric of which no two figures are equal."""

    def measure(self, denoiser: nn.Module, subject: Subject, task: Task, run: Run) -> Measurement:
        return Measurement("now", time.perf_counter(), "s", 1)


def test_check_strategy_runs_the_check_of_the_hook() -> None:
    CALLS.clear()
    check_strategy("tuners", Nudge())
    assert CALLS["prepare"] >= 2
    assert CALLS["recover"] >= 2
    with pytest.raises(ConformanceError, match="is a Gate"):
        check_strategy("gates", Draw())
    with pytest.raises(ConformanceError, match="pass an instance"):
        check_strategy("scorers", Draw)
    with pytest.raises(UnknownNameError, match="Did you mean 'scorers'"):
        check_strategy("scorer", Draw())
    with pytest.raises(ConformanceError, match="the same seed gives the same result"):
        check_strategy("metrics", Clock())
    check_strategy("metrics", Clock(), repeatable=False)


def test_the_tiny_space_has_every_unit_once() -> None:
    subject = tiny_subject()
    found = [unit for chain in tiny_space(subject).chains for unit in chain.units]
    assert sorted(found) == list(range(units(subject)))


def test_the_kit_needs_no_test_framework() -> None:
    code = (
        "import sys; sys.modules['pytest'] = sys.modules['hypothesis'] = None\n"
        "import moediff.testing; print(len(moediff.testing.CHECKS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "9", done.stderr
