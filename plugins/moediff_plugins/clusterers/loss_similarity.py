"""Split the timesteps where the size of their losses changes (after TMDA)."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs.validators import ge, in_, instance_of

from moediff.denoising import denoising_loss
from moediff.errors import DataError
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.clusterers.cuts import best_cuts, single_cut_objective
from moediff_plugins.clusterers.grid import grid


@attrs.frozen
class LossSimilarity:
    """Cluster timesteps by how close their losses are (TMDA, as DiffPruning Sec. 1 describes it).

    DiffPruning says that TMDA (Zhang et al., 2023) "clusters the denoising timesteps by their loss
    values' similarities", and gives no formula; TMDA's own text compares the outputs of optimal
    denoisers. So this is a guess, made to be compared with `alignment`: the same grid, the same
    exact optimum of Supp. Eq. 3, and for the losses l of the pretrained denoiser (Eq. 3), each the
    mean over images and noises of its own,

        a_{t,s} = 1 - |f(l_t) - f(l_s)| / (max f(l) - min f(l))    with f = log, or none

    The logarithm is the default because a loss of predicted noise spans decades: without it, the
    first few timesteps are set against all others. Costs forward passes only.

    Records "similarity" (G, G), "timesteps" (G,), "losses" (G,) and "objective" (G - 1,), as
    `alignment` does. One expert takes all timesteps, so nothing is computed and recorded for it.

    Attributes:
        stride: timesteps per cell, G = ceil(T / stride).
        images: images per cell.
        batch: how many of them go through the denoiser at once.
        scale: "log" compares ratios of losses, "linear" their differences.
    """

    stride: int = attrs.field(default=20, validator=[instance_of(int), ge(1)])
    images: int = attrs.field(default=1024, validator=[instance_of(int), ge(1)])
    batch: int = attrs.field(default=64, validator=[instance_of(int), ge(1)])
    scale: Literal["log", "linear"] = attrs.field(default="log", validator=in_(("log", "linear")))

    def cluster(self, subject: Subject, task: Task, run: Run) -> Intervals:
        if run.experts == 1:
            return Intervals.uniform(subject.total, 1)
        cells, timesteps = grid(subject.total, self.stride, run.experts)
        losses = self._losses(subject, task, run, timesteps)
        matrix = _closeness(losses.log() if self.scale == "log" else losses)
        run.record("similarity", matrix)
        run.record("timesteps", torch.tensor(timesteps))
        run.record("losses", losses)
        run.record("objective", torch.from_numpy(single_cut_objective(matrix.numpy())))
        cuts, objective = best_cuts(matrix.numpy(), run.experts)
        run.say(f"loss-similarity: objective {objective:.4f}")
        return Intervals(cells.cuts[cut] for cut in cuts)

    def _losses(self, subject: Subject, task: Task, run: Run, timesteps: list[int]) -> torch.Tensor:
        """Mean losses (G,) of the timesteps."""
        checkpoint, done = run.checkpoint("losses"), 0
        losses = torch.zeros(len(timesteps), dtype=torch.float64)
        if found := checkpoint.load():
            losses, done = found[0]["losses"], found[1]
            run.spend(samples=self.images * done)
        for row, timestep in enumerate(run.progress(timesteps, "losses per timestep")):
            if row < done:
                continue
            losses[row] = self._loss(subject, task, timestep, run)
            if not (torch.isfinite(losses[row]) and losses[row] > 0):
                raise DataError(
                    f"loss-similarity: the loss at timestep {timestep} is {float(losses[row])}; "
                    "allowed are finite numbers above 0. Check the denoiser's weights, or run it "
                    "in float32."
                )
            checkpoint.save({"losses": losses.clone()}, row + 1)
            run.spend(samples=self.images)
        return losses

    def _loss(self, subject: Subject, task: Task, timestep: int, run: Run) -> float:
        """The mean loss of `images` fresh images."""
        generator, total = run.generator(f"timestep {timestep}"), 0.0
        for start in range(0, self.images, self.batch):
            rows = min(self.batch, self.images - start)
            batch = task.batch(rows, generator, subject.device)
            steps = torch.full((rows,), timestep, device=subject.device)
            with torch.no_grad():
                loss = denoising_loss(subject.denoiser, subject.scheduler, batch, steps, generator)
            total += float(loss) * rows / self.images
        return total


def _closeness(values: torch.Tensor) -> torch.Tensor:
    """One minus the distances (G, G) between values (G,), as shares of their range."""
    spread = (values.max() - values.min()).clamp(min=torch.finfo(values.dtype).tiny)
    return 1 - (values[:, None] - values[None, :]).abs() / spread
