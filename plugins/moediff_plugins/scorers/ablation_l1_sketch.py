"""Estimate every channel's ablation score from a few backward passes through the sampler."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import torch
from attrs.validators import ge, in_, instance_of
from torch.utils.checkpoint import checkpoint as recomputed

from moediff.sampling import Call
from moediff.space import Scores
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.scorers.channels import ablated, by_unit, channel_counts, images_of


@attrs.frozen
class AblationL1Sketch:
    """Approximate `ablation-l1` (MoEDM Eq. 1) to first order, with random projections.

    Let J (pixels, M) be the derivative of a generated image by the masks of its M channels.
    Closing channel c moves the image by about -J[:, c], so its score is about |J[:, c]|_1. One
    backward pass through the whole sampler gives r J for one random r, for all channels at once.
    With r of independent Cauchy numbers every (r J)_c is Cauchy with scale |J[:, c]|_1, and the
    median of |(r J)_c| over projections estimates it (Indyk, 2006); with Gaussian numbers the root
    mean square estimates |J[:, c]|_2.

    The work is about 3 x images x projections samplings, whatever M is; every denoiser call is
    computed again in the backward pass, so the memory is that of one call plus a sample per step.

    It fails where an image does not depend linearly on a mask between 1 and 0: an effect that
    saturates, or that later steps correct, is scored too high, and one that only starts at large
    changes too low. Scores of layers are sums over channels; they do not say what removing all of
    them at once does. The median of k Cauchy numbers scatters by about 1.6 / sqrt(k); the mean over
    images brings that down, but near ties come out in random order.

    Attributes:
        norm: "l1" draws Cauchy projections, "l2" Gaussian ones.
        projections: k, per image.
        aggregate: "sum" or "mean" over a unit's channels.
        images: how many noises; drawn from the sampling's seeds.
        batch: how many rows, images x projections, go through the denoiser at once.
        by_interval: close channels inside an expert's interval only, as in `ablation-l1`.

    The record `channels` has the estimate of every channel (M,).
    """

    norm: Literal["l1", "l2"] = attrs.field(default="l1", validator=in_(("l1", "l2")))
    projections: int = attrs.field(default=8, validator=[instance_of(int), ge(1)])
    aggregate: Literal["sum", "mean"] = attrs.field(default="sum", validator=in_(("sum", "mean")))
    images: int = attrs.field(default=8, validator=[instance_of(int), ge(1)])
    batch: int = attrs.field(default=64, validator=[instance_of(int), ge(1)])
    by_interval: bool = attrs.field(default=False, validator=instance_of(bool))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"intervals"} if self.by_interval else ())

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        channels = sum(channel_counts(expert.anatomy))
        total = self.images * self.projections
        (calls,) = run.sampling.calls(expert.scheduler, Intervals((0, expert.total)))
        checkpoint, done = run.checkpoint("sketch"), 0
        pulled = torch.zeros(total, channels, dtype=torch.float64)
        if found := checkpoint.load():
            pulled, done = found[0]["pulled"], found[1]["rows"]
        run.spend(samples=done * calls)
        starts = range(done, total, self.batch)
        for start in run.progress(starts, "sketching ablations", total=len(starts)):
            rows = range(start, min(start + self.batch, total))
            pulled[rows.start : rows.stop] = self._pull(expert, list(rows), task, run)
            checkpoint.save({"pulled": pulled}, {"rows": rows.stop})
            run.spend(samples=len(rows) * calls)
        sizes = pulled.view(self.images, self.projections, channels).abs()
        pixels = torch.Size(expert.shape).numel()
        if self.norm == "l1":
            effect = sizes.quantile(0.5, dim=1) / pixels  # (images, M), |J|_1 per pixel
        else:
            effect = sizes.square().mean(1).sqrt() / pixels**0.5  # (images, M), |J|_2 likewise
        per_pixel = effect.mean(0)  # (M,)
        run.record("channels", per_pixel)
        return Scores(by_unit(expert.anatomy, per_pixel, self.aggregate))

    def _pull(self, expert: Subject, rows: list[int], task: Task, run: Run) -> torch.Tensor:
        """(r J) of every row (B, M); a row is one projection of one image."""
        draws = torch.stack([self._projection(expert.shape, run, row) for row in rows])
        like = next(expert.denoiser.parameters())
        masks = like.new_ones(len(rows), sum(channel_counts(expert.anatomy)), requires_grad=True)
        call = _thrifty(ablated(expert, masks))
        images = [row // self.projections for row in rows]
        with torch.enable_grad():
            made = images_of(call, expert, task, run, images)  # (B, C, H, W)
            (pulled,) = torch.autograd.grad(made, masks, draws.to(made))
        return pulled.double().cpu()

    def _projection(self, shape: tuple[int, int, int], run: Run, row: int) -> torch.Tensor:
        generator = run.generator(f"projection-{row}")
        if self.norm == "l2":
            return torch.randn(shape, generator=generator)
        return torch.empty(shape).cauchy_(generator=generator)


def _thrifty(call: Call) -> Call:
    """A call whose insides are computed again in the backward pass instead of being kept."""

    def thrifty(sample: torch.Tensor, timestep: Any, **conditioning: Any) -> Any:
        return recomputed(call, sample, timestep, use_reentrant=False, **conditioning)

    return thrifty
