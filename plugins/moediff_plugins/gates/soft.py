"""What the gates that learn masks share: soft masks, the loss with its penalty, and the plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import nn

from moediff.allowance import Allowance
from moediff.cost import Budget
from moediff.denoising import denoising_loss
from moediff.masking import masked
from moediff.plan import REST, Blueprint, Plan
from moediff.space import SearchSpace
from moediff.subject import Subject, gradients
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.gates.binarise import binarise
from moediff_plugins.gates.settings import Plain
from moediff_plugins.tuners.training import Descend, train

log = logging.getLogger(__name__)

Noise = Literal["logistic", "gumbel"]


class Settings(Protocol):
    """The fields that `learn` reads from a gate.

    Attributes:
        steps: optimiser steps; each one passes a batch through every expert.
        batch: B, images per expert and step.
        learning_rate: AdamW's.
        weight_decay: AdamW's.
        temperature: tau of the soft masks.
        noise: "logistic" or "gumbel".
        penalty: weight of R.
        save_every: steps between two checkpoints.
    """

    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def temperature(self) -> float: ...
    @property
    def noise(self) -> Noise: ...
    @property
    def penalty(self) -> float: ...
    @property
    def save_every(self) -> int: ...


def allowance_of(
    experts: Sequence[Subject],
    spaces: Sequence[SearchSpace],
    intervals: Intervals,
    budget: Budget,
    run: Run,
) -> Allowance:
    """The budget of experts that share nothing, weighted by the calls of the run's sampling.

    Raises:
        BudgetError: the budget is under the floor that the spaces can reach.
    """
    separate = tuple(range(len(experts)))
    allowance = Allowance(
        budget=budget,
        prices=budget.counter.price(experts[0]),
        calls=run.sampling.calls(experts[0].scheduler, intervals),
        copies=lambda part: separate,
    )
    allowance.check_floor(spaces)
    return allowance


def learn(
    settings: Settings,
    name: str,
    logits: nn.Module,
    experts: Sequence[Subject],
    spaces: Sequence[SearchSpace],
    intervals: Intervals,
    allowance: Allowance,
    task: Task,
    run: Run,
    *,
    ordered: bool = True,
) -> Plan:
    """Train logits of keeping every unit (DiffPruning Eq. 7-15), and make the plan that they mean.

    Records: `loss-<name>`, with the weighted R, `cost` (share of the base's) and `penalty` (R
    alone) are (steps,); `probabilities` is (N, U); `gap` () is how far the plan was from the
    budget before its units were rounded to meet it, as a share of the budget.

    Args:
        settings: usually the gate itself.
        name: of the checkpoint, the generators, the progress bar and the record of the loss.
        logits: called without arguments, returns v (N, U), on the CPU.
        experts: N, frozen meanwhile.
        spaces: N search spaces; units that go together share their noise.
        intervals: of the plan.
        allowance: the budget with its prices.
        task: what the experts' loss is measured on.
        run: the run.
        ordered: whether chains are kept in their order, see `binarise`.
    """
    checkpoint = run.checkpoint(f"{name}-log")
    curves = torch.full((2, settings.steps), float("nan"))
    saved = checkpoint.load()
    if saved is not None:
        curves.copy_(saved[0]["log"])
    descend = descent(settings, logits, experts, spaces, allowance, task, curves)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        value = descend(step, generator)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            checkpoint.save({"log": curves}, None)  # no later than the weights that go with it
        return value

    with frozen(experts):
        plain = Plain(settings.learning_rate, settings.weight_decay, settings.save_every)
        rows = settings.batch * len(experts)
        train(plain, name, logits, list(logits.parameters()), loss, settings.steps, rows, run)
    with torch.no_grad():
        probabilities = logits().sigmoid().double()  # (N, U)
    masks = binarise(probabilities, spaces, allowance, ordered=ordered)
    run.record("cost", curves[0])
    run.record("penalty", curves[1])
    run.record("probabilities", probabilities)
    gap = allowance.cost(probabilities.round()) / allowance.limit - 1
    run.record("gap", gap)
    run.say(f"{name}: {100 * float(gap):+.1f} % from the budget before binarisation")
    if float(allowance.cost(masks)) < 0.99 * allowance.limit:
        log.warning(
            "%s: the plan costs %.1f %% less than the budget; units this large get no nearer",
            name, 100 - 100 * float(allowance.cost(masks)) / allowance.limit,
        )  # fmt: skip
    blueprints = [Blueprint.from_mask(experts[0].anatomy, mask) for mask in masks]
    return Plan(intervals, blueprints, {REST: tuple(range(len(experts)))})


def descent(
    settings: Settings,
    logits: nn.Module,
    experts: Sequence[Subject],
    spaces: Sequence[SearchSpace],
    allowance: Allowance,
    task: Task,
    curves: torch.Tensor,
) -> Descend:
    """One step's loss and its gradient (Eq. 15); arguments as in `learn`.

    Column s of `curves` (2, steps) receives step s's cost, as a share of the base's, and its R.
    """
    together = torch.stack([_together(space) for space in spaces])  # (N, U)

    def descend(step: int, generator: torch.Generator) -> torch.Tensor:
        v = logits()  # (N, U)
        noise = draw(v.shape, settings.noise, generator).gather(1, together)
        soft = torch.sigmoid((v + noise) / settings.temperature)
        rounded = soft + (soft.round() - soft).detach()
        cost = allowance.cost(rounded.double()) / allowance.limit
        penalty = cost.log().abs()  # log(max(T, T_d) / min(T, T_d))
        curves[:, step] = torch.stack([cost * allowance.budget.value, penalty]).detach().float()
        weighted = settings.penalty * penalty
        # Expert by expert, so that only one expert's activations are held at a time.
        leaves = [row.detach().requires_grad_() for row in soft]
        parts = [
            _descend(expert, leaf, settings.batch, len(experts), task, generator)
            for expert, leaf in zip(experts, leaves, strict=True)
        ]
        slopes = torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None])
        torch.autograd.backward([soft, weighted], [slopes, torch.ones_like(weighted)])
        return torch.stack(parts).sum().cpu() + weighted.detach().float()

    return descend


def draw(shape: torch.Size, noise: Noise, generator: torch.Generator) -> torch.Tensor:
    """Noise for logits: standard logistic, or Gumbel(0, 1)."""
    uniform = torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    if noise == "gumbel":
        return -(-uniform.log()).log()
    return torch.logit(uniform)


def logit(p: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """Inverse sigmoid, finite at 0 and 1 (Suppl. Eq. 6)."""
    return torch.logit(p.clamp(0, 1) * (1 - 2 * epsilon) + epsilon)


def _together(space: SearchSpace) -> torch.Tensor:
    """For every unit, the first of the units that go with it (U,)."""
    first = torch.arange(len(space.anatomy.units))
    for chain in space.chains:
        for units in chain.steps:
            first[list(units)] = units[0]
    return first


def _descend(
    expert: Subject,
    mask: torch.Tensor,
    rows: int,
    count: int,
    task: Task,
    generator: torch.Generator,
) -> torch.Tensor:
    """An expert's share () of the loss under a soft mask (U,), which gets its gradient."""
    batch = task.batch(rows, generator, expert.device)
    timesteps = expert.timesteps(rows, generator)
    with masked(expert.denoiser, expert.anatomy, mask.to(expert.device)) as denoiser:
        loss = denoising_loss(denoiser, expert.scheduler, batch, timesteps, generator) / count
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def frozen(experts: Sequence[Subject]) -> AbstractContextManager[None]:
    """Train nothing but the masks: no gradients for the experts' own weights meanwhile."""
    return gradients((p for expert in experts for p in expert.denoiser.parameters()), False)
