"""Split the timesteps where the gradients of their losses stop agreeing (DiffPruning)."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import attrs
import torch
from attrs.validators import ge, instance_of

from moediff.denoising import denoising_loss
from moediff.errors import DataError
from moediff.storage import settings
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.clusterers.cuts import best_cuts, held_out, single_cut_objective
from moediff_plugins.clusterers.grid import grid
from moediff_plugins.clusterers.sketching import (
    CountSketch,
    Projection,
    Whole,
    add_gradient,
    cosines,
    differentiable,
)


def _even(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not (isinstance(value, int) and value >= 4 and value % 2 == 0):
        raise ValueError(f"'{attribute.name}' must be an even integer >= 4 or None: {value!r}")


@attrs.frozen
class Alignment:
    """Cluster timesteps by the cosine of their losses' gradients (DiffPruning Sec. 3.3, Supp. 2.1).

    The timesteps are read on a grid of G cells, each represented by its middle; cuts fall between
    cells. Every cell draws images and noise of its own: shared ones would make timesteps agree
    because of the draw. The cut points are the exact optimum of Supp. Eq. 3.

    Gradients are sketched to d numbers, parameter by parameter, while the backward pass makes them.
    The root mean square error of a cosine a is at most 2 (1 - a^2) / sqrt(d - 2) to first order and
    about half of that in practice (`sketching.CountSketch` derives it): 0.016 at the default.
    Beside the denoiser this needs the activations of a batch, its largest layers' gradients and
    2 G d floats, also on disk, where they serve any number of experts. Without a sketch it is
    3 G P floats for P parameters.

    Records "similarity" (G, G), "timesteps" (G,), "objective" (G - 1,), Eq. 1 by the place of a
    single cut, and "reliability" (G,), the cosine between the gradients of two halves of the
    images: where it is near zero, the matrix shows noise and more images are needed. To choose the
    number of experts, for N = 1 to 8 (to G, if that is less): "held-out-objective" (8,), J on one
    half of the images at the cuts found on the other, and "held-out-fit" (8,), which is largest at
    the N that the images support; `cuts.held_out` says why J is not. One expert takes all
    timesteps, so nothing is computed and recorded for it.

    Attributes:
        stride: timesteps per cell, G = ceil(T / stride).
        images: images per cell; the paper takes 1,024, and 16,384 for ImageNet.
        batch: how many of them go through the denoiser at once. At the size of LSUN-Bedroom (274 M
            parameters, 64x64) each adds 0.4 GB; 1 or 2 stay below a second copy of the model
            (`benchmarks/paper_alignment.py`).
        sketch: d, an even number; None keeps whole gradients, and so does a denoiser of at most d
            parameters.
    """

    stride: int = attrs.field(default=20, validator=[instance_of(int), ge(1)])
    images: int = attrs.field(default=1024, validator=[instance_of(int), ge(2)])
    batch: int = attrs.field(default=64, validator=[instance_of(int), ge(1)])
    sketch: int | None = attrs.field(default=4096, validator=_even)

    def cluster(self, subject: Subject, task: Task, run: Run) -> Intervals:
        if run.experts == 1:
            return Intervals.uniform(subject.total, 1)
        cells, timesteps = grid(subject.total, self.stride, run.experts)
        halves = self._gradients(subject, task, run, timesteps)
        first, second = halves.unbind(1)
        share = self.images // 2 / self.images
        matrix = cosines(share * first + (1 - share) * second)
        similarity, across = matrix.numpy(), cosines(first, second)
        first_within, second_within = cosines(first).numpy(), cosines(second).numpy()
        objectives, fits = held_out(
            first_within, second_within, across.numpy(), most=min(8, len(cells))
        )
        reliability = across.diagonal()
        run.record("similarity", matrix)
        run.record("timesteps", torch.tensor(timesteps))
        run.record("objective", torch.from_numpy(single_cut_objective(similarity)))
        run.record("reliability", reliability)
        run.record("held-out-objective", torch.from_numpy(objectives))
        run.record("held-out-fit", torch.from_numpy(fits))
        cuts, objective = best_cuts(similarity, run.experts)
        run.say(
            f"alignment: objective {objective:.4f}, median split-half reliability of the gradients "
            f"{float(reliability.median()):.2f}, best held-out fit with {1 + int(fits.argmax())} "
            "experts"
        )
        return Intervals(cells.cuts[cut] for cut in cuts)

    def _gradients(
        self, subject: Subject, task: Task, run: Run, timesteps: list[int]
    ) -> torch.Tensor:
        """Projected gradients (G, 2, d) of L_t for every timestep, by half of the images.

        A stage of their own: they are the same for any number of experts.
        """
        projection = self._projection(subject, run)
        generators = [run.generator(f"timestep {timestep}") for timestep in timesteps]
        seeds = [generator.initial_seed() for generator in generators]

        def compute() -> torch.Tensor:
            gradients = torch.empty(len(timesteps), 2, projection.size)
            rows = run.progress(range(len(timesteps)), "gradients per timestep")
            for row in rows:
                # One file per timestep: a single one would be written G times over.
                checkpoint = run.checkpoint(f"timestep-{timesteps[row]}")
                run.spend(samples=self.images)
                if found := checkpoint.load():
                    gradients[row] = found[0]["halves"]
                    continue
                gradients[row] = self._halves(
                    subject, task, timesteps[row], generators[row], projection
                )
                checkpoint.save({"halves": gradients[row].clone()}, None)
            return gradients

        return run.stage(
            "gradients",
            (
                version("moediff"), [subject.denoiser], settings(subject.scheduler.config), task,
                timesteps, seeds, self.images, self.batch, self.sketch,
            ),
            compute,
            pack=lambda result: ({"halves": result}, None),
            unpack=lambda tensors, _: tensors["halves"],
        )  # fmt: skip

    def _halves(
        self,
        subject: Subject,
        task: Task,
        timestep: int,
        generator: torch.Generator,
        projection: Projection,
    ) -> torch.Tensor:
        """The projected gradients (2, d) of L_t, one per half of the images."""
        sizes = (self.images // 2, self.images - self.images // 2)
        found = torch.stack(
            [self._gradient(subject, task, timestep, size, generator, projection) for size in sizes]
        )
        if not torch.isfinite(found).all():
            raise DataError(
                f"alignment: the gradient at timestep {timestep} is not finite. Check the "
                "denoiser's weights, or run it in float32."
            )
        return found

    def _projection(self, subject: Subject, run: Run) -> Projection:
        parameters = dict(subject.denoiser.named_parameters())
        whole = Whole.of(parameters)
        if self.sketch is None or whole.size <= self.sketch:
            return whole
        return CountSketch.of(parameters, self.sketch, lambda name: run.generator(f"sketch {name}"))

    def _gradient(
        self,
        subject: Subject,
        task: Task,
        timestep: int,
        images: int,
        generator: torch.Generator,
        projection: Projection,
    ) -> torch.Tensor:
        """The projected gradient (d,) of the mean loss of `images` fresh images, on the CPU."""
        total = torch.zeros(projection.size, device=subject.device)
        for start in range(0, images, self.batch):
            rows = min(self.batch, images - start)
            batch = task.batch(rows, generator, subject.device)
            steps = torch.full((rows,), timestep, device=subject.device)
            with differentiable(subject.denoiser) as parameters:
                loss = denoising_loss(subject.denoiser, subject.scheduler, batch, steps, generator)
                add_gradient(total, loss, parameters, projection, weight=rows / images)
        return total.cpu()
