"""The time of a denoiser call beside the base model's, measured in pairs (MoEDM Sec. 4.1)."""

from __future__ import annotations

import itertools
import statistics

import attrs
import torch
from attrs.validators import ge, instance_of
from torch import nn

from moediff.roles import Measurement
from moediff.sampling import fit
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.clock import paired_ratios


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

        def calls(model: nn.Module) -> None:
            rows, words = fit(model, sample, conditioning)
            for timestep in timesteps:
                model(rows, timestep, **words)

        with torch.inference_mode():
            timed = paired_ratios(lambda: calls(denoiser), lambda: calls(subject.denoiser), device)
            ratios = list(itertools.islice(timed, self.pairs))
        low, middle, high = statistics.quantiles(ratios, n=4)
        return Measurement("latency", middle, "x base", self.pairs, high - low)
