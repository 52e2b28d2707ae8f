"""Score channels by what the generated images lose with them (MoEDM)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import attrs
import torch
from attrs.validators import ge, in_, instance_of

from moediff.anatomy import Anatomy
from moediff.errors import OptionError
from moediff.masking import masked, masked_channels
from moediff.plan import Scores
from moediff.sampling import generate, initial_noise
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run

log = logging.getLogger(__name__)


@attrs.frozen
class AblationL1:
    """Score by the L1 distance of the images made with and without a channel (MoEDM, Eq. 1).

    Both images start from the same noise under the same guidance. The distance is the mean
    absolute difference per pixel and image: the paper's norm divided by the number of pixels,
    so that scores do not grow with the resolution. Scores compare across layers.

    The work is (ablations + 1) x images whole samplings; the numbers are logged at INFO before
    it starts, the time that it will take after the first batch. A run that was killed goes on at
    the batch where it stopped. The images come from the whole denoising path, whatever the
    expert's interval is.

    Attributes:
        grain: "channel" removes every inner channel alone, as Eq. 1 says. A unit's score is then
            the aggregate over its channels, a layer's over all channels of its widths (those of
            ResBlock and attention heads alike). "unit" removes every unit, layers too, as a whole.
        aggregate: "sum" or "mean" over channels; used by the grain "channel" only.
        images: how many noises every ablation is judged on; drawn from the sampling's seeds.
        batch: how many rows, ablations x images, go through the denoiser at once.
    """

    grain: Literal["channel", "unit"] = attrs.field(
        default="channel", validator=in_(("channel", "unit"))
    )
    aggregate: Literal["sum", "mean"] = attrs.field(default="sum", validator=in_(("sum", "mean")))
    images: int = attrs.field(default=8, validator=[instance_of(int), ge(1)])
    batch: int = attrs.field(default=128, validator=[instance_of(int), ge(1)])

    def __attrs_post_init__(self) -> None:
        if self.batch < self.images:
            raise OptionError(
                f"batch: got {self.batch} rows; allowed is {self.images} (`images`) or more, since "
                "an ablation's images run together. Raise batch or lower images."
            )

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        distances = self._distances(expert, task, run)
        if self.grain == "channel":
            distances = _by_unit(expert.anatomy, distances, self.aggregate)
        return Scores(distances, comparable=True)

    def _distances(self, expert: Subject, task: Task, run: Run) -> torch.Tensor:
        """The distance (M,) in float64 that each of M ablations makes."""
        ablations = len(expert.anatomy.units)
        if self.grain == "channel":
            ablations = sum(_channel_counts(expert.anatomy))
        together = self.batch // self.images
        starts = range(0, ablations, together)
        (calls,) = run.sampling.calls(expert.scheduler, Intervals.uniform(expert.total, 1))
        checkpoint = run.checkpoint("ablations")
        distances, done = torch.zeros(ablations, dtype=torch.float64), 0
        if found := checkpoint.load():
            distances, done = found[0]["distances"], found[1]["batches"]
        todo = starts[done:]
        log.info(
            "ablation-l1: %d ablations x %d images of %d denoiser calls, %d of %d batches to run",
            ablations, self.images, calls, len(todo), len(starts),
        )  # fmt: skip
        intact = self._generate(expert, task, run, 1).double()
        run.spend(samples=self.images * calls)
        for start in run.progress(todo, f"ablating {ablations} {self.grain}s", total=len(todo)):
            began = time.perf_counter()
            rows = min(together, ablations - start)
            masks = torch.ones(rows, ablations, device=expert.device)
            masks[torch.arange(rows), torch.arange(start, start + rows)] = 0
            with _closed(expert, masks.repeat_interleave(self.images, dim=0), self.grain):
                ablated = self._generate(expert, task, run, rows).double()
            # S_c = |I(eps, g) - I_c(eps, g)|_1, per pixel and image            (MoEDM Eq. 1)
            gap = (ablated.view(rows, *intact.shape) - intact).abs()  # (rows, images, C, H, W)
            distances[start : start + rows] = gap.flatten(1).mean(1).cpu()
            done += 1
            checkpoint.save({"distances": distances}, {"batches": done})
            run.spend(samples=rows * self.images * calls)
            if start == todo[0]:
                took = time.perf_counter() - began
                log.info("ablation-l1: about %.0f s for all batches", took * len(todo))
        return distances

    def _generate(self, expert: Subject, task: Task, run: Run, copies: int) -> torch.Tensor:
        """Images (copies x images, C, H, W), every copy from the same noise and conditioning."""
        seeds = run.sampling.seeds(self.images)
        dtype = next(expert.denoiser.parameters()).dtype
        noise = initial_noise(seeds, expert.shape).to(expert.device, dtype)
        conditioning, null = (
            {name: value.repeat(copies, *[1] * (value.ndim - 1)) for name, value in rows.items()}
            for rows in task.prompts(self.images, expert.device)
        )
        with torch.no_grad():
            return generate(
                expert.denoiser, expert.scheduler, run.sampling, noise.repeat(copies, 1, 1, 1),
                conditioning, null, seeds * copies,
            )  # fmt: skip


def _channel_counts(anatomy: Anatomy) -> list[int]:
    return [width.count * width.size for width in anatomy.widths.values()]


@contextmanager
def _closed(expert: Subject, masks: torch.Tensor, grain: str) -> Iterator[None]:
    """Mask row by row, masks (B, U) for units or (B, M) for the M channels of all widths."""
    with ExitStack() as stack:
        if grain == "unit":
            stack.enter_context(masked(expert.denoiser, expert.anatomy, masks))
        else:
            parts = torch.split(masks, _channel_counts(expert.anatomy), dim=1)
            for width, part in zip(expert.anatomy.widths.values(), parts, strict=True):
                if not bool(part.all()):
                    stack.enter_context(masked_channels(expert.denoiser, width, part))
        yield


def _by_unit(anatomy: Anatomy, channels: torch.Tensor, aggregate: str) -> torch.Tensor:
    """Channel scores (M,) -> unit scores (U,)."""
    reduce = torch.sum if aggregate == "sum" else torch.mean
    by_width = torch.split(channels, _channel_counts(anatomy))
    parts = dict(zip(anatomy.widths, by_width, strict=True))
    values = torch.zeros(len(anatomy.units), dtype=channels.dtype)
    for layer in anatomy.layers:
        for width in layer.widths:
            by_unit = parts[width.name].view(width.count, width.size)
            values[anatomy.spans[width.name]] = reduce(by_unit, dim=1)
        if layer.droppable:
            everything = torch.cat([parts[width.name] for width in layer.widths])
            values[anatomy.layer_units[layer.name]] = reduce(everything)
    return values
