"""The time of a denoiser call beside the base model's, measured in pairs (MoEDM Sec. 4.1)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import attrs
import torch
from attrs.validators import ge, instance_of
from torch import nn

from moediff.roles import Measurement
from moediff.sampling import fit
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run


@attrs.frozen
class Latency:
    """Median ratio of the seconds of one sampling's denoiser calls, this model over the base.

    Each pair calls both at every timestep of the run's sampling, one right after the other and in
    changing order, so that a machine that slows down slows both. MoEDM times at batch 4.

    Attributes:
        batch: B, rows of a call.
        pairs: how many pairs; the spread is the interquartile range of their ratios.
    """

    batch: int = attrs.field(default=4, validator=[instance_of(int), ge(1)])
    pairs: int = attrs.field(default=7, validator=[instance_of(int), ge(3)])

    def measure(self, denoiser: nn.Module, subject: Subject, task: Task, run: Run) -> Measurement:
        device = subject.device
        generator = run.generator("latency")
        sample = torch.randn(self.batch, *subject.shape, generator=generator).to(device)
        conditioning, _ = task.prompts(self.batch, device)
        timesteps = run.sampling.prepare(subject.scheduler, device).timesteps

        def seconds(model: nn.Module) -> float:
            rows, words = fit(model, sample, conditioning)
            started = _clock(device)
            for timestep in timesteps:
                model(rows, timestep, **words)
            return _clock(device) - started

        with torch.inference_mode():
            ratios = _paired_ratios(
                lambda: seconds(denoiser), lambda: seconds(subject.denoiser), self.pairs
            )
        low, middle, high = statistics.quantiles(ratios, n=4)
        return Measurement("latency", middle, "x base", self.pairs, high - low)


def _paired_ratios(ours: Callable[[], float], base: Callable[[], float], pairs: int) -> list[float]:
    ours(), base()  # the first calls allocate
    ratios = []
    for pair in range(pairs):
        if pair % 2:
            second = base()
            ratios.append(ours() / second)
        else:
            first = ours()
            ratios.append(first / base())
    return ratios


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
