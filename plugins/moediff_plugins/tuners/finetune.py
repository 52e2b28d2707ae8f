"""Fine-tune every expert on its own interval (DiffPruning Sec. 3.6, with the loss of Eq. 5)."""

from __future__ import annotations

import attrs
from attrs.validators import ge, gt, in_, instance_of, lt

from moediff.mixture import ExpertMixture
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.tuners.training import PRECISIONS, SCHEDULES, trainable
from moediff_plugins.tuners.turns import train_in_turns


@attrs.frozen
class Finetune:
    """Untie the mixture and train it with the denoising loss, the experts in turns.

    What the experts share learns from every interval, and a copy from its own timesteps alone.
    Records: see `turns.train_in_turns`.

    Attributes:
        steps: optimiser steps, summed over the experts.
        batch: B, images per step.
        learning_rate: see `training.Settings` for this field and those that follow.
    """

    steps: int = attrs.field(default=1000, validator=[instance_of(int), ge(0)])
    batch: int = attrs.field(default=64, validator=[instance_of(int), ge(1)])
    learning_rate: float = attrs.field(default=1e-4, validator=gt(0))
    weight_decay: float = attrs.field(default=0.0, validator=ge(0))
    schedule: str = attrs.field(default="cosine", validator=in_(SCHEDULES))
    warmup: float = attrs.field(default=0.05, validator=[ge(0), lt(1)])
    clip: float = attrs.field(default=1.0, validator=gt(0))
    ema: float = attrs.field(default=0.999, validator=[ge(0), lt(1)])
    save_every: int = attrs.field(default=500, validator=[instance_of(int), ge(1)])
    precision: str = attrs.field(default="full", validator=in_(PRECISIONS))

    def recover(
        self, mixture: ExpertMixture, task: Task, teacher: Subject, run: Run
    ) -> ExpertMixture:
        mixture.untie()
        train_in_turns(self, "finetune", mixture, trainable(mixture), task, teacher, run)
        return mixture
