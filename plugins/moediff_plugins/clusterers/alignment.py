"""Split the timesteps where the gradients of their losses stop agreeing (DiffPruning)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import numpy as np
import numpy.typing as npt
import torch
from attrs.validators import ge, instance_of
from torch import nn

from moediff.errors import DataError, OptionError
from moediff.subject import Subject
from moediff.task import Task, denoising_loss
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.clusterers.cuts import best_cuts, single_cut_objective

log = logging.getLogger(__name__)


@attrs.frozen
class Alignment:
    """Cluster timesteps by the cosine of their losses' gradients (DiffPruning Sec. 3.3, Supp. 2.1).

    The timesteps are read on a grid of G cells, each represented by its middle; cuts fall between
    cells. Every cell draws images and noise of its own: shared ones would make timesteps agree
    because of the draw. The cut points are the exact optimum of Supp. Eq. 3.

    Needs G x P floats of main memory for a denoiser of P parameters (float32), and as much disk
    for resuming. Records "similarity" (G, G), "timesteps" (G,), "objective" (G - 1,), Eq. 1 by the
    place of a single cut, and "reliability" (G,), the cosine between the gradients of two halves of
    the images: where it is near zero, the matrix shows noise and more images are needed.
    One expert takes all timesteps, so nothing is computed and recorded for it.

    Attributes:
        stride: timesteps per cell, G = ceil(T / stride).
        images: images per cell; the paper takes 1,024, and 16,384 for ImageNet.
        batch: how many of them go through the denoiser at once.
    """

    stride: int = attrs.field(default=20, validator=[instance_of(int), ge(1)])
    images: int = attrs.field(default=256, validator=[instance_of(int), ge(2)])
    batch: int = attrs.field(default=64, validator=[instance_of(int), ge(1)])

    def cluster(self, subject: Subject, task: Task, run: Run) -> Intervals:
        if run.experts == 1:
            return Intervals.uniform(subject.total, 1)
        cells = Intervals.uniform(subject.total, -(-subject.total // self.stride))
        if len(cells) < run.experts:
            raise OptionError(
                f"stride: got {self.stride}, which makes {len(cells)} cells of the {subject.total} "
                f"timesteps; {run.experts} experts need at least as many. Set stride to at most "
                f"{(subject.total - 1) // (run.experts - 1)}, or ask for fewer experts."
            )
        timesteps = [(low + high) // 2 for low, high in cells]
        gradients, reliability = self._gradients(subject, task, run, timesteps)
        similarity = _cosines(gradients)
        run.record("similarity", torch.from_numpy(similarity))
        run.record("timesteps", torch.tensor(timesteps))
        run.record("objective", torch.from_numpy(single_cut_objective(similarity)))
        run.record("reliability", reliability)
        cuts, objective = best_cuts(similarity, run.experts)
        log.info(
            "alignment: objective %.4f, median split-half reliability of the gradients %.2f",
            objective, float(reliability.median()),
        )  # fmt: skip
        return Intervals(cells.cuts[cut] for cut in cuts)

    def _gradients(
        self, subject: Subject, task: Task, run: Run, timesteps: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients (G, P) of L_t for every timestep, and their reliability (G,)."""
        size = sum(parameter.numel() for parameter in subject.denoiser.parameters())
        gradients = torch.empty(len(timesteps), size)
        reliability = torch.empty(len(timesteps), dtype=torch.float64)
        half = self.images // 2
        for row, timestep in enumerate(run.progress(timesteps, "gradients per timestep")):
            # One file per timestep: a single one would be written G times over.
            checkpoint = run.checkpoint(f"timestep-{timestep}")
            if found := checkpoint.load():
                gradients[row], reliability[row] = found[0]["gradient"], found[1]
                continue
            generator = run.generator(f"timestep {timestep}")
            first = self._gradient(subject, task, timestep, half, generator)
            second = self._gradient(subject, task, timestep, self.images - half, generator)
            if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
                raise DataError(
                    f"alignment: the gradient at timestep {timestep} is not finite. Check the "
                    "denoiser's weights, or run it in float32."
                )
            gradients[row] = (first * half + second * (self.images - half)) / self.images
            reliability[row] = torch.cosine_similarity(first.double(), second.double(), dim=0)
            checkpoint.save({"gradient": gradients[row]}, float(reliability[row]))
            run.spend(samples=self.images)
        return gradients, reliability

    def _gradient(
        self, subject: Subject, task: Task, timestep: int, images: int, generator: torch.Generator
    ) -> torch.Tensor:
        """The gradient (P,) of the mean loss of `images` fresh images, float32 on the CPU."""
        total = torch.zeros(sum(p.numel() for p in subject.denoiser.parameters()))
        for start in range(0, images, self.batch):
            rows = min(self.batch, images - start)
            batch = task.batch(rows, generator, subject.device)
            steps = torch.full((rows,), timestep, device=subject.device)
            with _differentiable(subject.denoiser) as parameters:
                loss = denoising_loss(subject.denoiser, subject.scheduler, batch, steps, generator)
                parts = torch.autograd.grad(loss, parameters, materialize_grads=True)
            total += torch.cat([part.flatten().float() for part in parts]).cpu() * (rows / images)
        return total


@contextmanager
def _differentiable(denoiser: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Let gradients flow to every parameter, then set the flags back as they were."""
    parameters = list(denoiser.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield parameters
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def _cosines(gradients: torch.Tensor) -> npt.NDArray[np.float64]:
    """Cosines (G, G) between the rows of (G, P), summed in float64 without a copy of that size."""
    columns = torch.split(gradients, 65_536, dim=1)
    products = sum(
        (part.double() @ part.double().T for part in columns),
        start=torch.zeros(len(gradients), len(gradients), dtype=torch.float64),
    )
    norms = products.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return (products / norms[:, None] / norms[None, :]).numpy()
