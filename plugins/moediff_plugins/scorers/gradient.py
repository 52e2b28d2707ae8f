"""Score units by the gradient of the loss on the weights that produce them."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import ge, instance_of

from moediff.space import Scores
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.scorers.losses import trained_weights, weight_slopes
from moediff_plugins.scorers.weights import norm_per_weight


@attrs.frozen
class Gradient:
    """Score by the mean |dL/dw| of a unit's weights (after Liu et al., 2021), to compare with.

    L is the denoising loss (DiffPruning Eq. 3) averaged over all samples, so the gradient is that
    of one large batch. Which weights a unit has is said at `weights.norm_per_weight`. MoEDM's
    Table 4 finds this no guide for diffusion models. Scores compare across layers.

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
        weights = trained_weights(expert)
        _, slopes = weight_slopes(
            expert, weights, task, self.samples, self.batch,
            lambda start: run.generator(f"batch-{start}"), run, "gradient",
        )  # fmt: skip
        by_weight = {id(weight): total for weight, total in zip(weights, slopes, strict=True)}

        def pick(weight: torch.Tensor) -> torch.Tensor:
            return by_weight.get(id(weight), torch.zeros_like(weight))  # frozen ones learn nothing

        return Scores(norm_per_weight(expert, pick))
