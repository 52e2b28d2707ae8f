"""Train experts whose sub-networks all work (DiffPruning Sec. 3.4, Eq. 4-5, and Supp. 2.2)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import ClassVar

import attrs
import torch
from attrs.validators import ge, gt, in_, instance_of, le, lt

from moediff.denoising import denoising_loss
from moediff.masking import masked
from moediff.roles import Rank
from moediff.space import SearchSpace
from moediff.subject import Subject, preserved
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.tuners.training import (
    PRECISIONS,
    SCHEDULES,
    autocast,
    share,
    train,
    trainable,
    warn_if_idle,
)

Draw = Callable[[torch.Generator], torch.Tensor]
"""A random mask (U,) of zeros and ones."""


@attrs.frozen
class Elastic:
    """Give each interval its own expert: elastic depth, rank the units again, elastic width.

    Depth: per batch, every layer of the search space is passed over with probability `p`,
    independently (Eq. 4). Width: per batch, every width of W units loses its floor(W r) least
    important ones, r ~ U[0, 1) drawn anew for each (Supp. 2.2), so one always stays; a pruner that
    removes several units at a time counts these as one. Both minimise the interval's denoising loss
    (Eq. 5). The paper trains the two one after the other and does not say whether layers are still
    passed over while widths change; here they are not. The paper sorts units once, before elastic
    width; the engine ranks those of the finished experts again.

    Some random sub-networks, drawn as training draws them, show what it was good for: their losses
    on one batch of the interval, with the given weights and with the tuned ones. The records of
    expert i are `loss-depth-<i>` and `loss-width-<i>`, one loss per step, `subnets-<i>` (S, U),
    the masks of S sub-networks, and `subnets-before-<i>` and `subnets-after-<i>` (S,).

    Attributes:
        depth_steps: optimiser steps with elastic depth, summed over the experts.
        width_steps: optimiser steps with elastic width, summed over the experts.
        p: probability that a layer is passed over in a batch.
        batch: B, images per step.
        subnets: S, how many sub-networks of every expert are compared.
        learning_rate: see `training.Settings` for this field and those that follow.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"widths"})

    depth_steps: int = attrs.field(default=1000, validator=[instance_of(int), ge(0)])
    width_steps: int = attrs.field(default=1000, validator=[instance_of(int), ge(0)])
    p: float = attrs.field(default=0.5, validator=[ge(0), le(1)])
    batch: int = attrs.field(default=64, validator=[instance_of(int), ge(1)])
    subnets: int = attrs.field(default=12, validator=[instance_of(int), ge(0)])
    learning_rate: float = attrs.field(default=1e-4, validator=gt(0))
    weight_decay: float = attrs.field(default=0.0, validator=ge(0))
    schedule: str = attrs.field(default="cosine", validator=in_(SCHEDULES))
    warmup: float = attrs.field(default=0.05, validator=[ge(0), lt(1)])
    clip: float = attrs.field(default=1.0, validator=gt(0))
    ema: float = attrs.field(default=0.999, validator=[ge(0), lt(1)])
    save_every: int = attrs.field(default=500, validator=[instance_of(int), ge(1)])
    precision: str = attrs.field(default="full", validator=in_(PRECISIONS))

    def prepare(
        self, experts: Sequence[Subject], rank: Rank, intervals: Intervals, task: Task, run: Run
    ) -> Sequence[Subject]:
        count = len(experts)
        longest = max(self.depth_steps, self.width_steps)  # each phase gives its first expert one
        warn_if_idle(self, longest, count)
        copies = [attrs.evolve(e, denoiser=copy.deepcopy(e.denoiser).eval()) for e in experts]
        draws: list[list[Draw]] = [[] for _ in copies]
        if self.depth_steps:
            space = rank(experts[0])  # which layers there are is the same for all experts
            for index, expert in enumerate(copies):
                if steps := share(self.depth_steps, count, index):
                    draws[index].append(_depths(space, self.p))
                    self._tune(f"depth-{index}", expert, draws[index][-1], steps, task, run)
        if self.width_steps:
            for index, expert in enumerate(copies):
                if steps := share(self.width_steps, count, index):
                    draws[index].append(_widths(rank(expert)))
                    self._tune(f"width-{index}", expert, draws[index][-1], steps, task, run)
        for index, draw in enumerate(draws):
            if draw and self.subnets:
                self._compare(index, experts[index], copies[index], draw, task, run)
        return tuple(copies)

    def _tune(
        self, name: str, expert: Subject, draw: Draw, steps: int, task: Task, run: Run
    ) -> None:
        """Train one expert of our own on its interval, a new sub-network in every step."""

        def descend(step: int, generator: torch.Generator) -> torch.Tensor:
            batch = task.batch(self.batch, generator, expert.device)
            timesteps = expert.timesteps(self.batch, generator)  # (B,)
            with masked(expert.denoiser, expert.anatomy, draw(generator)) as denoiser:
                with autocast(self.precision, expert.device):
                    loss = denoising_loss(denoiser, expert.scheduler, batch, timesteps, generator)
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        parameters = trainable(expert.denoiser)
        train(self, name, expert.denoiser, parameters, descend, steps, self.batch, run)

    def _compare(
        self, index: int, before: Subject, after: Subject, draws: list[Draw], task: Task, run: Run
    ) -> None:
        """Record what the tuning did to sub-networks that are closed in every tuned way at once."""
        generator = run.generator(f"subnets-{index}")
        drawn = [[draw(generator) for draw in draws] for _ in range(self.subnets)]
        masks = torch.stack([torch.stack(parts).prod(0) for parts in drawn])  # (S, U)
        run.record(f"subnets-{index}", masks)
        for name, expert in (("before", before), ("after", after)):
            losses = [self._loss(index, expert, mask, task, run) for mask in masks]
            run.record(f"subnets-{name}-{index}", torch.tensor(losses))

    def _loss(self, index: int, expert: Subject, mask: torch.Tensor, task: Task, run: Run) -> float:
        """The loss of a sub-network; images, timesteps and noise are the same for all of them."""
        generator = run.generator(f"judge-{index}")
        batch = task.batch(self.batch, generator, expert.device)
        timesteps = expert.timesteps(self.batch, generator)  # (B,)
        run.spend(samples=self.batch)
        hidden = masked(expert.denoiser, expert.anatomy, mask)
        with torch.no_grad(), preserved(expert.denoiser), hidden as denoiser:
            loss = denoising_loss(denoiser, expert.scheduler, batch, timesteps, generator)
        return loss.item()


def _depths(space: SearchSpace, p: float) -> Draw:
    """s_j ~ Bernoulli(p); layer j is passed over where s_j = 1 (Eq. 4)."""
    units = space.anatomy.units
    layers = [unit for chain in space.chains for unit in chain.units if units[unit].width is None]

    def draw(generator: torch.Generator) -> torch.Tensor:
        mask = torch.ones(len(units))
        s = torch.rand(len(layers), generator=generator) < p  # (layers,)
        mask[layers] = (~s).float()
        return mask

    return draw


def _widths(space: SearchSpace) -> Draw:
    """Of each chain of W steps, close the first floor(W r), the least important (Supp. 2.2)."""
    units = space.anatomy.units
    chains = [chain.steps for chain in space.chains if units[chain.units[0]].width is not None]

    def draw(generator: torch.Generator) -> torch.Tensor:
        mask = torch.ones(len(units))
        ratios = torch.rand(len(chains), generator=generator, dtype=torch.float64)  # r in [0, 1)
        for chain, r in zip(chains, ratios.tolist(), strict=True):
            for step in chain[: int(len(chain) * r)]:
                mask[list(step)] = 0
        return mask

    return draw
