"""What the tests of the conformance kit share: to be caught, and to call a denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moediff import Run, Subject, Task
from moediff.testing import ConformanceError


def caught(check: Callable[[Any], None], strategy: Any, message: str) -> None:
    """The check names the strategy and the promise."""
    with pytest.raises(ConformanceError, match=message) as info:
        check(strategy)
    assert isinstance(info.value, AssertionError)
    name = strategy.__name__ if isinstance(strategy, type) else type(strategy).__name__
    assert str(info.value).startswith(f"{name}: ")


def units(subject: Subject) -> int:
    return len(subject.anatomy.units)


def call(expert: Subject, task: Task) -> torch.Tensor:
    rows = {name: value[:2] for name, value in task.conditioning.items()}
    output: torch.Tensor = expert.denoiser(task.samples[:2], 3, **rows).sample
    return output


def leave_hook(expert: Subject, task: Task, run: Run) -> None:
    expert.denoiser.conv_in.register_forward_hook(lambda *_: None)
