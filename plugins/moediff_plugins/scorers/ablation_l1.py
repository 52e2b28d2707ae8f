"""Score channels by what the generated images lose with them (MoEDM)."""

from __future__ import annotations

import time
from typing import Literal

import attrs
import torch
from attrs.validators import ge, in_, instance_of, optional

from moediff.errors import OptionError
from moediff.sampling import Call
from moediff.space import Scores
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.scorers.channels import (
    ablated,
    by_unit,
    channel_counts,
    images_of,
    rank_stability,
)


@attrs.frozen
class AblationL1:
    """Score by the L1 distance of the images made with and without a channel (MoEDM, Eq. 1).

    Both images start from the same noise under the same guidance. The distance is the mean
    absolute difference per pixel and image: the paper's norm divided by the number of pixels,
    so that scores do not grow with the resolution. Scores compare across layers.

    The work is (ablations + 1) x images whole samplings; the numbers are said before it starts
    (see `Run.say`), the time that it will take after the first batch. A run that was killed goes
    on at the batch where it stopped.

    Attributes:
        grain: "channel" removes every inner channel alone, as Eq. 1 says. A unit's score is then
            the aggregate over its channels, a layer's over all channels of its widths (those of
            ResBlock and attention heads alike). "unit" removes every unit, layers too, as a whole.
        aggregate: "sum" or "mean" over channels; used by the grain "channel" only.
        images: how many noises every ablation is judged on; drawn from the sampling's seeds.
        batch: how many rows, ablations x images, go through the denoiser at once.
        channels: how many channels of every width are ablated, drawn at random; None means all.
            The others count as the mean of their unit, or of their width. The record
            `rank-stability` says how well the layers' ranking stands (see `rank_stability`), and
            `channels` has the score of every channel (M,), NaN where there is none.
        by_interval: remove a channel inside an expert's interval only, which gives every expert
            scores of its own, (N, U) in all. Neither paper ran this.
    """

    grain: Literal["channel", "unit"] = attrs.field(
        default="channel", validator=in_(("channel", "unit"))
    )
    aggregate: Literal["sum", "mean"] = attrs.field(default="sum", validator=in_(("sum", "mean")))
    images: int = attrs.field(default=8, validator=[instance_of(int), ge(1)])
    batch: int = attrs.field(default=128, validator=[instance_of(int), ge(1)])
    channels: int | None = attrs.field(default=None, validator=optional([instance_of(int), ge(1)]))
    by_interval: bool = attrs.field(default=False, validator=instance_of(bool))

    def __attrs_post_init__(self) -> None:
        if self.batch < self.images:
            raise OptionError(
                f"batch: got {self.batch} rows; allowed is {self.images} (`images`) or more, since "
                "an ablation's images run together. Raise batch or lower images."
            )
        if self.channels is not None and self.grain == "unit":
            raise OptionError(
                "channels: got a number of channels for the grain 'unit', which removes whole "
                "units. Leave it out, or choose the grain 'channel'."
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"intervals"} if self.by_interval else ())

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        anatomy = expert.anatomy
        if self.grain == "unit":
            units = torch.arange(len(anatomy.units))
            return Scores(self._distances(expert, units, len(units), task, run))
        counts = channel_counts(anatomy)
        chosen = self._chosen(counts, run)
        distances = torch.full((sum(counts),), torch.nan, dtype=torch.float64)
        distances[chosen] = self._distances(expert, chosen, sum(counts), task, run)
        run.record("channels", distances)
        if len(chosen) < sum(counts):
            stable = rank_stability(anatomy, distances, run.generator("halves"))
            run.record("rank-stability", torch.tensor(stable))
            run.say(f"ablation-l1: the layers' rank stability is {stable:.2f}")
        return Scores(by_unit(anatomy, distances, self.aggregate))

    def _chosen(self, counts: list[int], run: Run) -> torch.Tensor:
        """The numbers of the channels that are ablated, increasing."""
        generator, first, chosen = run.generator("channels"), 0, []
        for count in counts:
            order = torch.arange(count)
            if self.channels is not None and self.channels < count:
                order = torch.randperm(count, generator=generator)[: self.channels].sort().values
            chosen.append(first + order)
            first += count
        return torch.cat(chosen)

    def _distances(
        self, expert: Subject, chosen: torch.Tensor, count: int, task: Task, run: Run
    ) -> torch.Tensor:
        """The distance (n,) in float64 that each of n ablations, out of `count`, makes."""
        together = self.batch // self.images
        starts = range(0, len(chosen), together)
        (calls,) = run.sampling.calls(expert.scheduler, Intervals((0, expert.total)))
        checkpoint = run.checkpoint("ablations")
        distances, done = torch.zeros(len(chosen), dtype=torch.float64), 0
        if found := checkpoint.load():
            distances, done = found[0]["distances"], found[1]["batches"]
        todo = starts[done:]
        run.say(
            f"ablation-l1: {len(chosen)} ablations x {self.images} images of {calls} denoiser "
            f"calls, {len(todo)} of {len(starts)} batches to run"
        )
        run.spend(samples=min(done * together, len(chosen)) * self.images * calls)
        intact = self._images(expert, torch.ones(0, count), task, run).double()
        run.spend(samples=self.images * calls)
        title = f"ablating {len(chosen)} {self.grain}s"
        for start in run.progress(todo, title, total=len(todo)):
            began = time.perf_counter()
            closed = chosen[start : start + together]
            masks = torch.ones(len(closed), count, device=expert.device)
            masks[torch.arange(len(closed)), closed] = 0
            images = self._images(expert, masks, task, run).double()
            # S_c = |I(eps, g) - I_c(eps, g)|_1, per pixel and image            (MoEDM Eq. 1)
            gap = (images.view(-1, *intact.shape) - intact).abs()  # (rows, images, C, H, W)
            distances[start : start + together] = gap.flatten(1).mean(1).cpu()
            done += 1
            checkpoint.save({"distances": distances}, {"batches": done})
            run.spend(samples=len(images) * calls)
            if start == todo[0]:
                took = time.perf_counter() - began
                run.say(f"ablation-l1: about {took * len(todo):.0f} s for all batches")
        return distances

    def _images(self, expert: Subject, masks: torch.Tensor, task: Task, run: Run) -> torch.Tensor:
        """Images (rows x images, C, H, W) of every mask (rows, M or U); of none, intact ones."""
        call: Call = expert.denoiser
        rows = list(range(self.images)) * max(len(masks), 1)
        if len(masks):
            spread = masks.repeat_interleave(self.images, dim=0)
            call = ablated(expert, spread, units=self.grain == "unit")
        with torch.no_grad():
            return images_of(call, expert, task, run, rows)
