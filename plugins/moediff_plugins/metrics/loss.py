"""The denoising loss on a task's images (DiffPruning Eq. 3), for example ones never trained on."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import ge, instance_of
from torch import nn

from moediff.denoising import denoising_loss
from moediff.roles import Measurement
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run


@attrs.frozen
class Loss:
    """The mean denoising loss over all timesteps, evenly.

    Images, timesteps and noise depend on the run alone, so that two models are compared on the same
    ones and differ by far less than distances between sets of images do. It says nothing of how
    errors add up while sampling. The spread is the standard error of the mean over the batches, for
    one model; differences between models are surer than that.

    Attributes:
        samples: how many noisy images; the task's are drawn with replacement.
        batch: B, how many go through the denoiser at once.
    """

    samples: int = attrs.field(default=1024, validator=[instance_of(int), ge(1)])
    batch: int = attrs.field(default=64, validator=[instance_of(int), ge(1)])

    def measure(self, denoiser: nn.Module, subject: Subject, task: Task, run: Run) -> Measurement:
        generator, device = run.generator("loss"), subject.device
        order = torch.randperm(self.samples, generator=generator)
        timesteps = (order * subject.total / self.samples).long()  # every part of [0, T) alike
        losses, sizes = [], []
        starts = range(0, self.samples, self.batch)
        for start in run.progress(starts, "loss", total=len(starts)):
            t = timesteps[start : start + self.batch].to(device)  # (B,)
            rows = task.batch(len(t), generator, device)
            with torch.no_grad():
                loss = denoising_loss(denoiser, subject.scheduler, rows, t, generator)
            losses.append(float(loss))
            sizes.append(len(t))
        found = torch.tensor(losses, dtype=torch.float64)
        weights = torch.tensor(sizes, dtype=torch.float64) / self.samples
        mean = float((found * weights).sum())
        error = float(found.std() / len(found) ** 0.5) if len(found) > 1 else None
        return Measurement("loss", mean, "", self.samples, error)
