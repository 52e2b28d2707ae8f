"""How long a call takes, and how much longer than another one, timed side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")


def seconds(call: Callable[[], Any], device: torch.device = CPU) -> float:
    """Seconds of a call, everything that it started on the device included."""
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def paired_ratios(
    ours: Callable[[], Any], base: Callable[[], Any], device: torch.device = CPU
) -> Iterator[float]:
    """Yield the seconds of one call over those of another, a pair each time, without end.

    A pair runs close together, so that whatever else the machine does hits both, and its order
    alternates, so that neither profits from going second. Both run once before, unmeasured,
    because the first calls allocate.
    """
    ours(), base()
    while True:
        first = seconds(ours, device)
        yield first / seconds(base, device)
        second = seconds(base, device)
        yield seconds(ours, device) / second


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
