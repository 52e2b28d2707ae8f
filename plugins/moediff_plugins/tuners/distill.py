"""Train the mixture to say what the full model says (MoEDM Eq. 3), in two phases (Appendix B)."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import ge, gt, in_, le, lt
from torch import nn
from torch.nn.functional import mse_loss

from moediff.errors import DataError
from moediff.mixture import ExpertMixture
from moediff.sampling import generate, initial_noise, predict
from moediff.subject import Subject, preserved
from moediff.task import Task, corrupt, denoising_loss
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.tuners.training import SCHEDULES, train, trainable, warn_if_idle

SEED_OFFSET = 2**31
"""From the recipe's sampling seeds to the teacher's; a CPU generator reads a seed's low 32 bits."""


@attrs.frozen
class Distill:
    """Fit the full model's output on images that it made, first tied, then each copy by itself.

    The full model generates the training set once, with the recipe's scheduler, steps and guidance
    and the task's conditioning. Its seeds lie half the seeds' range away from those of the recipe's
    sampling, so no image starts from a noise that is sampled later. The loss compares the two
    conditional outputs; guidance, which combines two calls, acts on the images alone.

    Both phases draw timesteps over [0, T), and the mixture routes every row of a batch. In the tied
    phase all rows train the same weights. Then the mixture is untied: a copy has gradients from the
    rows of its own timesteps alone (Sec. 3.2), and modules that all experts share are frozen. Where
    no module is divided (one expert) or none is shared, the second phase trains everything. Each
    phase has its own warm-up and schedule. Records: `loss-tied` and `loss-own`.

    Attributes:
        steps: optimiser steps of both phases, summed over the experts.
        tied_share: share of the steps in the tied phase.
        images: how many images the full model generates; with 0 the task's own are used.
        mix: share of the loss that is the denoising loss on the task's own images.
        batch: B, images per step, and per batch of generation.
        learning_rate: see `training.Settings` for this field and those that follow.
    """

    steps: int = attrs.field(default=1000, validator=ge(0))
    tied_share: float = attrs.field(default=0.5, validator=[ge(0), le(1)])
    images: int = attrs.field(default=1000, validator=ge(0))
    mix: float = attrs.field(default=0.0, validator=[ge(0), le(1)])
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
        warn_if_idle(self, self.steps, 1)
        mixture.eval()
        tied = round(self.steps * self.tied_share)
        rows = self.batch * ((2 if self.mix < 1 else 0) + (1 if self.mix > 0 else 0))
        with preserved(teacher.denoiser):
            data = self._data(task, teacher, run) if self.steps and self.mix < 1 else task

            def descend(step: int, generator: torch.Generator) -> torch.Tensor:
                loss = self._loss(mixture, data, task, teacher, generator)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            train(self, "tied", mixture, trainable(mixture), descend, tied, rows, run)
            mixture.untie()
            own = self.steps - tied
            train(self, "own", mixture, _divided(mixture), descend, own, rows, run)
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
            with torch.no_grad():
                wanted = predict(teacher.denoiser, z, timesteps, batch.conditioning)
            # L'_d = || O'(z_t, t, g) - O(z_t, t, g) ||_2 (Eq. 3), squared and averaged
            output = predict(mixture, z, timesteps, batch.conditioning)
            parts.append((1 - self.mix) * mse_loss(output, wanted))
        if self.mix > 0:
            batch = task.batch(self.batch, generator, device)
            real = denoising_loss(mixture, teacher.scheduler, batch, timesteps, generator)
            parts.append(self.mix * real)
        return torch.stack(parts).sum()

    def _data(self, task: Task, teacher: Subject, run: Run) -> Task:
        """The task with images of the full model in place of its own; a killed run keeps them."""
        if self.images == 0:
            return task
        chosen, null = task.prompts(self.images)
        first = run.sampling.seeds(1)[0] + SEED_OFFSET
        calls = sum(run.sampling.calls(teacher.scheduler, Intervals((0, teacher.total))))
        checkpoint = run.checkpoint("teacher-images")
        saved = checkpoint.load()
        images = saved[0]["images"] if saved else torch.empty(0, *teacher.shape)  # (n, C, H, W)
        run.spend(samples=len(images) * calls)
        for start in run.progress(range(len(images), self.images, self.batch), "teacher images"):
            rows = slice(start, min(start + self.batch, self.images))
            seeds = [first + index for index in range(rows.start, rows.stop)]
            noise = initial_noise(seeds, teacher.shape).to(teacher.device)
            asked, free = (
                {name: value[rows].to(teacher.device) for name, value in words.items()}
                for words in (chosen, null)
            )
            with torch.no_grad():
                made = generate(
                    teacher.denoiser, teacher.scheduler, run.sampling, noise, asked, free, seeds
                )
            if not torch.isfinite(made).all():
                raise DataError(
                    f"teacher: one of the images {start} to {rows.stop - 1} came out NaN or "
                    "infinite. Change the sampling, or use the task's own images (images=0)."
                )
            images = torch.cat([images, made.float().cpu()])
            run.spend(samples=len(seeds) * calls)
            checkpoint.save({"images": images}, None)
        return attrs.evolve(task, samples=images, conditioning=chosen)


def _divided(mixture: ExpertMixture) -> list[nn.Parameter]:
    """The parameters that not all experts share; all parameters where there are none."""
    used = [{id(parameter) for parameter in expert.parameters()} for expert in mixture.experts]
    shared = set.intersection(*used)
    everything = trainable(mixture)
    return [p for p in everything if id(p) not in shared] or everything
