"""Fine-tune every expert on its own interval (DiffPruning Sec. 3.6, with the loss of Eq. 5)."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import ge, gt, in_, lt

from moediff.mixture import ExpertMixture
from moediff.subject import Subject
from moediff.task import Task, denoising_loss
from moediff.workdir import Run
from moediff_plugins.tuners.training import SCHEDULES, train, trainable, warn_if_idle


@attrs.frozen
class Finetune:
    """Untie the mixture and train the experts in turns with the denoising loss.

    Step k trains expert k mod N on timesteps of its interval, with one optimiser over all distinct
    parameters. So what the experts share learns from every interval, and a copy from its own
    timesteps alone: where a step does not reach, AdamW skips. Moving average and learning rate run
    over all steps. The record `loss-finetune` is (steps,).

    Attributes:
        steps: optimiser steps, summed over the experts.
        batch: B, images per step.
        learning_rate: see `training.Settings` for this field and those that follow.
    """

    steps: int = attrs.field(default=1000, validator=ge(0))
    batch: int = attrs.field(default=64, validator=ge(1))
    learning_rate: float = attrs.field(default=1e-4, validator=gt(0))
    weight_decay: float = attrs.field(default=0.0, validator=ge(0))
    schedule: str = attrs.field(default="cosine", validator=in_(SCHEDULES))
    warmup: float = attrs.field(default=0.05, validator=[ge(0), lt(1)])
    clip: float = attrs.field(default=1.0, validator=gt(0))
    ema: float = attrs.field(default=0.999, validator=[ge(0), lt(1)])
    save_every: int = attrs.field(default=500, validator=ge(1))

    def recover(
        self, mixture: ExpertMixture, task: Task, teacher: Subject, run: Run
    ) -> ExpertMixture:
        count = len(mixture.experts)
        warn_if_idle(self, self.steps, count)
        mixture.untie()
        mixture.eval()
        parameters = trainable(mixture)
        device = parameters[0].device

        def descend(step: int, generator: torch.Generator) -> torch.Tensor:
            expert = step % count
            batch = task.batch(self.batch, generator, device)
            timesteps = mixture.intervals.sample(self.batch, generator, expert).to(device)  # (B,)
            loss = denoising_loss(
                mixture.experts[expert], teacher.scheduler, batch, timesteps, generator
            )
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        train(self, "finetune", mixture, parameters, descend, self.steps, self.batch, run)
        return mixture
