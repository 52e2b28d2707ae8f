"""What the tuners that train experts in turns share: their loop, for any choice of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from moediff.denoising import denoising_loss
from moediff.mixture import ExpertMixture
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.tuners.training import Settings, autocast, train, warn_if_idle


class TurnSettings(Settings, Protocol):
    """The fields that `train_in_turns` reads from a tuner.

    Attributes:
        steps: optimiser steps, summed over the experts.
        batch: B, images per step.
        precision: a name from `PRECISIONS`.
    """

    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def precision(self) -> str: ...


def train_in_turns(
    settings: TurnSettings,
    name: str,
    mixture: ExpertMixture,
    parameters: Sequence[nn.Parameter],
    task: Task,
    teacher: Subject,
    run: Run,
) -> None:
    """Train some of a mixture's parameters with the denoising loss, the experts in turns.

    Step k trains expert k mod N on timesteps of its interval, with one optimiser over all of
    `parameters`. So what the experts share learns from every interval, and a copy from its own
    timesteps alone: where a step does not reach, AdamW skips. Moving average and learning rate run
    over all steps. Records: `loss-<name>` (steps,), and `trained-share` (), the parameters that
    are trained as a share of all stored ones, each counted once.
    """
    count, device = len(mixture.experts), parameters[0].device
    warn_if_idle(settings, settings.steps, count)
    mixture.eval()

    def descend(step: int, generator: torch.Generator) -> torch.Tensor:
        expert = step % count
        batch = task.batch(settings.batch, generator, device)
        timesteps = mixture.intervals.sample(settings.batch, generator, expert).to(device)  # (B,)
        with autocast(settings.precision, device):
            loss = denoising_loss(
                mixture.experts[expert], teacher.scheduler, batch, timesteps, generator
            )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    train(settings, name, mixture, parameters, descend, settings.steps, settings.batch, run)
    sizes = [sum(p.numel() for p in some) for some in (parameters, mixture.parameters())]
    run.record("trained-share", torch.tensor(sizes[0] / sizes[1]))
