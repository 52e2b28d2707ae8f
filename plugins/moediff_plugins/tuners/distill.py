"""Train the mixture to say what the full model says (MoEDM Eq. 3), in two phases (Appendix B)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from attrs.validators import ge, gt, in_, instance_of, le, lt, optional
from torch import nn
from torch.nn.functional import mse_loss

from moediff.denoising import corrupt, denoising_loss
from moediff.errors import UnknownNameError, did_you_mean
from moediff.mixture import ExpertMixture
from moediff.sampling import Sampling, predict
from moediff.subject import Subject, preserved
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.tuners.teacher import check_prompts, teacher_task
from moediff_plugins.tuners.training import (
    PRECISIONS,
    SCHEDULES,
    autocast,
    train,
    trainable,
    warn_if_idle,
)


def _sampling(value: Any) -> Any:
    """A table of a recipe file as the value that it describes."""
    if not isinstance(value, Mapping):
        return value
    allowed = [field.name for field in attrs.fields(Sampling)]
    for key in value:
        if key not in allowed:
            raise UnknownNameError(f"sampling: unknown key {key!r}.{did_you_mean(key, allowed)}")
    return Sampling(**value)


@attrs.frozen
class Distill:
    """Fit the full model's output on images that it made, first tied, then each copy by itself.

    The full model generates the training set once, from the task's training prompts, with seeds
    that the recipe's sampling does not draw; see `teacher.teacher_task`. The loss compares the two
    conditional outputs, all of them: where the variance is learned, its half as well, which the
    denoising loss (`mix`) leaves alone. Guidance, which combines two calls, acts on the images
    alone. Prompts that are no class labels must differ from those that are sampled, the task's
    `held_out` rows. The rows of the task's `extra` are real images, in both losses.

    Both phases draw timesteps over [0, T), and the mixture routes every row of a batch. In the tied
    phase all rows train the same weights. Then the mixture is untied: a copy has gradients from the
    rows of its own timesteps alone (Sec. 3.2), and modules that all experts share are frozen. The
    second phase trains everything where there was no tied one, and where no module is divided (one
    expert). Each phase has its own warm-up and schedule. Records: `loss-tied` and `loss-own`.

    Attributes:
        steps: optimiser steps of both phases, summed over the experts.
        tied_share: share of the steps in the tied phase.
        images: how many images the full model generates; with 0 the task's own are used.
        sampling: how it generates them: a `Sampling` or a table of its fields, with a seed of its
            own. None is the recipe's, with other seeds.
        mix: share of the loss that is the denoising loss on the task's own images.
        batch: B, images per step, and per batch of generation.
        learning_rate: see `training.Settings` for this field and those that follow.
    """

    steps: int = attrs.field(default=1000, validator=[instance_of(int), ge(0)])
    tied_share: float = attrs.field(default=0.5, validator=[ge(0), le(1)])
    images: int = attrs.field(default=1000, validator=[instance_of(int), ge(0)])
    sampling: Sampling | None = attrs.field(
        default=None, converter=_sampling, validator=optional(instance_of(Sampling))
    )
    mix: float = attrs.field(default=0.0, validator=[ge(0), le(1)])
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
        warn_if_idle(self, self.steps, 1)
        mixture.eval()
        tied = round(self.steps * self.tied_share)
        rows = self.batch * ((2 if self.mix < 1 else 0) + (1 if self.mix > 0 else 0))
        data = task
        with preserved(teacher.denoiser):
            if self.steps:
                check_prompts(task)
            if self.steps and self.mix < 1 and self.images:
                data = teacher_task(task, teacher, self.sampling, self.images, self.batch, run)

            def descend(step: int, generator: torch.Generator) -> torch.Tensor:
                with autocast(self.precision, teacher.device):
                    loss = self._loss(mixture, data, task, teacher, generator)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            train(self, "tied", mixture, trainable(mixture), descend, tied, rows, run)
            mixture.untie()
            own = self.steps - tied
            parameters = _divided(mixture) if tied else trainable(mixture)
            train(self, "own", mixture, parameters, descend, own, rows, run)
        return mixture

    def _loss(
        self,
        mixture: ExpertMixture,
        data: Task,
        task: Task,
        teacher: Subject,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """One step's loss () on timesteps of all intervals."""
        device = next(mixture.parameters()).device
        timesteps = mixture.intervals.sample(self.batch, generator).to(device)  # (B,)
        parts = []
        if self.mix < 1:
            batch = data.batch(self.batch, generator, device)
            noise = torch.randn(batch.clean.shape, generator=generator).to(batch.clean)
            z, _ = corrupt(teacher.scheduler, batch.clean, noise, timesteps)  # (B, C, H, W)
            with torch.no_grad():  # (B, C or 2C, H, W)
                wanted = predict(teacher.denoiser, z, timesteps, batch.conditioning, whole=True)
            # L'_d = || O'(z_t, t, g) - O(z_t, t, g) ||_2 (Eq. 3), squared and averaged
            output = predict(mixture, z, timesteps, batch.conditioning, whole=True)
            parts.append((1 - self.mix) * mse_loss(output, wanted))
        if self.mix > 0:
            batch = task.batch(self.batch, generator, device)
            real = denoising_loss(mixture, teacher.scheduler, batch, timesteps, generator)
            parts.append(self.mix * real)
        return torch.stack(parts).sum()


def _divided(mixture: ExpertMixture) -> list[nn.Parameter]:
    """The parameters that not all experts share; all parameters where there are none."""
    used = [{id(parameter) for parameter in expert.parameters()} for expert in mixture.experts]
    shared = set.intersection(*used)
    everything = trainable(mixture)
    return [p for p in everything if id(p) not in shared] or everything
