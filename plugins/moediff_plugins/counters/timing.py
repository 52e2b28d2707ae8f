"""What the latency counter needs: a call to time, the inputs inside of it, the fastest timing."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moediff.errors import CountError
from moediff_plugins.clock import seconds
from moediff_plugins.counters.inputs import example

LEAST = 2e-3
"""Seconds that one timing takes at least; shorter calls are repeated inside of it."""


def shared_copy(denoiser: nn.Module) -> nn.Module:
    """A copy in eval mode that holds the same tensors; modules may be swapped and cut."""
    # deepcopy looks an object up here before it copies it.
    memo: dict[int, Any] = {id(t): t for t in (*denoiser.parameters(), *denoiser.buffers())}
    return copy.deepcopy(denoiser, memo).eval()


def batch_of(
    denoiser: nn.Module, shape: Sequence[int] | None, rows: int
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A denoiser's twin in eval mode and zeros to call it with, B rows on its device.

    Raises:
        CountError: its weights are on "meta", so that it cannot run.
    """
    weights = next(denoiser.parameters())
    if weights.device.type == "meta":
        raise CountError(
            'latency: the denoiser is on "meta" and cannot run. Load its weights on the device '
            "that counts, or count with macs."
        )
    inputs = {}
    for name, value in example(denoiser, shape, str(weights.device)).items():
        dtype = weights.dtype if value.is_floating_point() else value.dtype
        inputs[name] = value.to(dtype).repeat(rows, *[1] * (value.ndim - 1))
    return shared_copy(denoiser), inputs


@torch.no_grad()
def captured(
    model: nn.Module, paths: Sequence[str], inputs: Mapping[str, torch.Tensor]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments that each module gets when `model`, a copy of our own, is called."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = []
    for path in paths:

        def keep(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            seen[path] = (args, kwargs)

        handles.append(model.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True))
    model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def fastest(calls: Sequence[Callable[[], Any]], device: torch.device, rounds: int) -> list[float]:
    """Least milliseconds of each call, all of them timed in turns.

    Whatever else the machine does can only add to a time, as `timeit` says.
    """

    def one(call: Callable[[], Any], repeats: int) -> float:
        def repeated() -> None:
            for _ in range(repeats):
                call()

        return seconds(repeated, device) / repeats

    for call in calls:  # the first calls allocate
        call()
    repeats = [max(1, round(LEAST / max(one(call, 1), 1e-7))) for call in calls]
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, count, times in zip(calls, repeats, found, strict=True):
            times.append(one(call, count))
    return [1e3 * min(times) for times in found]


def device_name(device: torch.device) -> str:
    """The device as its maker calls it; of a CPU also how many threads torch uses."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name} x{torch.get_num_threads()}"
