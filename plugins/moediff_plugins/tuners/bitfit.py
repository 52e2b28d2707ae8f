"""Fine-tune the biases alone (BitFit; Zaken et al., 2021), a baseline of MoEDM's Table 1."""

from __future__ import annotations

import attrs
from attrs.validators import ge, gt, in_, instance_of, lt

from moediff.errors import OptionError
from moediff.mixture import ExpertMixture
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.tuners.training import PRECISIONS, SCHEDULES, trainable
from moediff_plugins.tuners.turns import train_in_turns


@attrs.frozen
class BitFit:
    """Untie the mixture and train every bias with the denoising loss, the experts in turns.

    Biases are those of convolutions, linear modules and normalisations; all else is frozen. So
    few parameters bear, and need, a higher learning rate: ten times the other tuners' by default.
    Records: see `turns.train_in_turns`.

    Attributes:
        steps: optimiser steps, summed over the experts.
        batch: B, images per step.
        learning_rate: see `training.Settings` for this field and those that follow.
    """

    steps: int = attrs.field(default=1000, validator=[instance_of(int), ge(0)])
    batch: int = attrs.field(default=64, validator=[instance_of(int), ge(1)])
    learning_rate: float = attrs.field(default=1e-3, validator=gt(0))
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
        ours = {id(parameter) for parameter in trainable(mixture)}
        biases = [
            parameter
            for name, parameter in mixture.named_parameters()
            if name.rpartition(".")[2] == "bias" and id(parameter) in ours
        ]
        if not biases:
            raise OptionError(
                "bitfit: the denoiser has no biases that may be trained. Call "
                "`denoiser.requires_grad_(True)` before the mixture is built, or choose another "
                "tuner."
            )
        train_in_turns(self, "bitfit", mixture, biases, task, teacher, run)
        return mixture
