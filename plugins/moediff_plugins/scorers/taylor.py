"""Score units by the first-order Taylor estimate of the loss that they are worth."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import ge, instance_of

from moediff.masking import masked
from moediff.space import Scores
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.scorers.losses import denoising_losses


@attrs.frozen
class Taylor:
    """Score by |dL/dm| at m = 1, the mask's own gradient (Molchanov et al., 2017 and 2019).

    Closing a unit moves its mask from 1 to 0, so to first order the loss changes by the negative
    derivative. L is the denoising loss of one sample (DiffPruning Eq. 3); the absolute value is
    taken sample by sample and then averaged, as in the first of the two papers. Layers are scored
    by their own masks. Scores compare across layers.

    Attributes:
        samples: how many noisy samples; timesteps are drawn from the expert's interval.
        batch: B, samples per pass.
        by_interval: score every expert on its own interval instead of all on [0, T).
    """

    samples: int = attrs.field(default=256, validator=[instance_of(int), ge(1)])
    batch: int = attrs.field(default=64, validator=[instance_of(int), ge(1)])
    by_interval: bool = attrs.field(default=False, validator=instance_of(bool))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"intervals"} if self.by_interval else ())

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        total = torch.zeros(len(expert.anatomy.units), dtype=torch.float64)
        like = next(expert.denoiser.parameters())
        for start in run.progress(range(0, self.samples, self.batch), "taylor"):
            rows = min(self.batch, self.samples - start)
            masks = like.new_ones(rows, len(total), requires_grad=True)
            with torch.enable_grad(), masked(expert.denoiser, expert.anatomy, masks):
                losses = denoising_losses(expert, task, rows, run.generator(f"batch-{start}"))
                (slopes,) = torch.autograd.grad(losses.sum(), masks)  # (B, U)
            total += slopes.double().abs().sum(0).cpu()
            run.spend(samples=rows)
        return Scores(total / self.samples)
