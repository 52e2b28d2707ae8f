"""What the scorers of single channels share: how channels are numbered, closed and summed up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from moediff.anatomy import Anatomy
from moediff.masking import masked, masked_channels
from moediff.sampling import Call, generate, initial_noise
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run


def channel_counts(anatomy: Anatomy) -> list[int]:
    """How many channels each width has; the M channels are numbered width by width."""
    return [width.count * width.size for width in anatomy.widths.values()]


def ablated(expert: Subject, masks: torch.Tensor, *, units: bool = False) -> Call:
    """The denoiser with single channels, or units, closed at the timesteps of the interval.

    Args:
        expert: at timesteps outside its interval the denoiser stays whole.
        masks: (B, M) for the M channels of all widths, or (B, U) for `units`; one row a sample.
        units: whether the masks are for units.
    """
    edges = Intervals(sorted({0, *expert.interval, expert.total}))
    inside = edges.route(expert.interval[0])
    parts = [] if units else torch.split(masks, channel_counts(expert.anatomy), dim=1)
    closing = [
        (width, part)
        for width, part in zip(expert.anatomy.widths.values(), parts, strict=False)
        if part.requires_grad or not bool((part == 1).all())
    ]

    def call(sample: torch.Tensor, timestep: Any, **conditioning: Any) -> Any:
        with ExitStack() as stack:
            if edges.route(timestep) == inside:
                if units:
                    stack.enter_context(masked(expert.denoiser, expert.anatomy, masks))
                for width, part in closing:
                    stack.enter_context(masked_channels(expert.denoiser, width, part))
            return expert.denoiser(sample, timestep, **conditioning)

    return call


def images_of(
    call: Call, expert: Subject, task: Task, run: Run, rows: Sequence[int]
) -> torch.Tensor:
    """Images (B, C, H, W) made from the noises and prompts `rows`, which may repeat."""
    count = max(rows) + 1
    seeds = run.sampling.seeds(count)
    dtype = next(expert.denoiser.parameters()).dtype
    noise = initial_noise(seeds, expert.shape).to(expert.device, dtype)
    conditioning, null = (
        {name: value[list(rows)] for name, value in words.items()}
        for words in task.prompts(count, expert.device)
    )
    return generate(
        call, expert.scheduler, run.sampling, noise[list(rows)], conditioning, null,
        [seeds[row] for row in rows],
    )  # fmt: skip


def by_unit(anatomy: Anatomy, channels: torch.Tensor, aggregate: str) -> torch.Tensor:
    """Channel scores (M,) -> unit scores (U,), sums or means over a unit's channels.

    A layer's own unit aggregates all channels of its widths. Channels that are NaN were not
    scored; they count as the mean of their unit or, where it has none, of their width.
    """
    parts = torch.split(channels.double(), channel_counts(anatomy))
    values = torch.zeros(len(anatomy.units), dtype=torch.float64)
    filled: dict[str, torch.Tensor] = {}
    for (name, width), part in zip(anatomy.widths.items(), parts, strict=True):
        grid = part.view(width.count, width.size)
        means = grid.nanmean(dim=1, keepdim=True)
        grid = torch.where(grid.isnan(), torch.where(means.isnan(), part.nanmean(), means), grid)
        values[anatomy.spans[name]] = grid.sum(1) if aggregate == "sum" else grid.mean(1)
        filled[name] = grid.flatten()
    for layer in anatomy.layers:
        if layer.droppable:
            own = torch.cat([filled[width.name] for width in layer.widths])
            values[anatomy.layer_units[layer.name]] = (
                own.sum() if aggregate == "sum" else own.mean()
            )
    return values


def rank_stability(
    anatomy: Anatomy, channels: torch.Tensor, generator: torch.Generator, splits: int = 50
) -> float:
    """How far the ranking of layers depends on which of their channels were scored.

    The channels that were scored (those of (M,) that are not NaN) are split into random halves,
    layer by layer. Returned is the mean Spearman correlation of the layers' mean scores from the
    two halves: 1 is the same ranking. Half of the channels rank worse than all of them do, so
    this is on the low side. Layers with less than two scored channels are left out;
    NaN says that less than two layers remain, so that there is no ranking.
    """
    parts = dict(
        zip(anatomy.widths, torch.split(channels.double(), channel_counts(anatomy)), strict=True)
    )
    scored = []
    for layer in anatomy.layers:
        own = torch.cat([parts[width.name] for width in layer.widths])
        own = own[~own.isnan()]
        scored.extend([own] if len(own) > 1 else [])
    if len(scored) < 2:
        return math.nan
    found = []
    for _ in range(splits):
        halves: tuple[list[float], list[float]] = ([], [])
        for own in scored:
            order = torch.randperm(len(own), generator=generator)
            for half, rows in zip(halves, order.chunk(2), strict=True):
                half.append(own[rows].mean().item())
        found.append(spearman(torch.tensor(halves[0]), torch.tensor(halves[1])))
    return sum(found) / len(found)


def spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    """Rank correlation of two vectors (n,) without ties (Spearman, 1904)."""
    ranks = [value.argsort().argsort().double() for value in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
