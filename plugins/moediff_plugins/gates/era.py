"""The Expert Routing Agent: learn all experts' widths and depths together (DiffPruning 3.5-3.6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal

import attrs
import torch
from attrs.validators import ge, gt, in_
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from moediff.cost import Allowance, Budget
from moediff.masking import masked
from moediff.plan import REST, Blueprint, Plan, SearchSpace
from moediff.subject import Subject
from moediff.task import Task, denoising_loss
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.gates.binarise import binarise
from moediff_plugins.gates.settings import Plain
from moediff_plugins.tuners.training import train

Noise = Literal["logistic", "gumbel"]


@attrs.frozen
class ERA:
    """Train a GRU that predicts every keep probability from fixed noise (DiffPruning Eq. 6-15).

    Two departures from the print, both for a reason. Eq. 7 adds one Gumbel(0, 1) draw, which keeps
    63 % at v = 0; the difference of two of them, a logistic draw, keeps 50 % (Maddison et al.,
    2017), and `noise="gumbel"` is the print. The supplement's sum starts at e + 1, so the last
    unit could never stay; here it starts at e, so the first one always does.

    The records `loss-era`, `cost` (share of the base's) and `penalty` are (steps,), and
    `probabilities` is (N, U); `gap` () is how far the plan was from the budget before its units
    were rounded to meet it, as a share of the budget.

    Attributes:
        steps: optimiser steps; each one passes a batch through every expert.
        batch: B, images per expert and step.
        learning_rate: AdamW's.
        weight_decay: AdamW's.
        temperature: tau of the soft masks.
        noise: "logistic" or "gumbel".
        hidden: the GRU's width; its input is half as wide.
        save_every: steps between two checkpoints.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prices"})

    steps: int = attrs.field(default=1000, validator=ge(1))
    batch: int = attrs.field(default=32, validator=ge(1))
    learning_rate: float = attrs.field(default=1e-3, validator=gt(0))
    weight_decay: float = attrs.field(default=0.01, validator=ge(0))
    temperature: float = attrs.field(default=0.4, validator=gt(0))
    noise: Noise = attrs.field(default="logistic", validator=in_(("logistic", "gumbel")))
    hidden: int = attrs.field(default=256, validator=ge(2))
    save_every: int = attrs.field(default=500, validator=ge(1))

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        separate = tuple(range(len(experts)))
        allowance = Allowance(
            budget=budget,
            prices=budget.counter.price(experts[0]),
            calls=run.sampling.calls(experts[0].scheduler, intervals),
            copies=lambda part: separate,
        )
        allowance.check_floor(spaces)
        agent = _agent(spaces, self.hidden, run)
        log = torch.full((2, self.steps), float("nan"))

        def loss(step: int, generator: torch.Generator) -> torch.Tensor:
            v = agent()  # (N, U)
            soft = torch.sigmoid((v + _draw(v.shape, self.noise, generator)) / self.temperature)
            rounded = soft + (soft.round() - soft).detach()
            cost = allowance.cost(rounded.double()) / allowance.limit
            penalty = cost.log().abs()  # log(max(T, T_d) / min(T, T_d))
            log[:, step] = torch.stack([cost * budget.value, penalty]).detach().float()
            # Expert by expert, so that only one expert's activations are held at a time.
            leaves = [row.detach().requires_grad_() for row in soft]
            value = torch.zeros(())
            for expert, leaf in zip(experts, leaves, strict=True):
                value += self._descend(expert, leaf, len(experts), task, generator)
            gradients = torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None])
            torch.autograd.backward([soft, penalty], [gradients, torch.ones_like(penalty)])
            return value + penalty.detach().float()  # Eq. 15

        with _frozen(experts):
            settings = Plain(self.learning_rate, self.weight_decay, self.save_every)
            parameters = list(agent.parameters())
            rows = self.batch * len(experts)
            train(settings, "era", agent, parameters, loss, self.steps, rows, run)
        with torch.no_grad():
            probabilities = agent().sigmoid().double()  # (N, U)
        masks = binarise(probabilities, spaces, allowance)
        gap = allowance.cost(probabilities.round()) / allowance.limit - 1
        run.record("cost", log[0])
        run.record("penalty", log[1])
        run.record("probabilities", probabilities)
        run.record("gap", gap)
        anatomy = experts[0].anatomy
        blueprints = [Blueprint.from_mask(anatomy, mask) for mask in masks]
        return Plan(intervals, blueprints, {REST: separate})

    def _descend(
        self,
        expert: Subject,
        mask: torch.Tensor,
        count: int,
        task: Task,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """An expert's share () of the loss under a soft mask (U,), which gets its gradient."""
        batch = task.batch(self.batch, generator, expert.device)
        timesteps = expert.timesteps(self.batch, generator)
        with masked(expert.denoiser, expert.anatomy, mask.to(expert.device)) as denoiser:
            loss = denoising_loss(denoiser, expert.scheduler, batch, timesteps, generator) / count
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach().cpu()


class _Agent(nn.Module):
    """h_ERA: one GRU and one head per chain, shared by the experts; only z differs (Suppl. 2.3)."""

    z: torch.Tensor

    def __init__(self, spaces: Sequence[SearchSpace], hidden: int, z: torch.Tensor) -> None:
        super().__init__()
        self.spaces = spaces
        self.register_buffer("z", z)  # (N, K, hidden / 2)
        gru = nn.GRU(z.shape[-1], hidden, batch_first=True)
        self.gru = weight_norm(weight_norm(gru, "weight_ih_l0"), "weight_hh_l0")
        self.heads = nn.ModuleList(
            weight_norm(nn.Linear(hidden, len(chain.units))) for chain in spaces[0].chains
        )

    def forward(self) -> torch.Tensor:
        """Logits v (N, U) of keeping every unit; large where nothing can be removed."""
        states = self.gru(self.z)[0].relu()  # (N, K, hidden)
        bound = _logit(torch.ones(()))
        rows = []
        for expert, space in enumerate(self.spaces):
            v = bound.repeat(len(space.anatomy.units))
            for k, chain in enumerate(space.chains):
                o = self.heads[k](states[expert, k])  # (W,), the most important unit first
                y = torch.softmax(o, dim=-1)
                p = y.flip(-1).cumsum(-1).flip(-1)  # p_e = sum of y_w over w >= e
                v = v.index_copy(0, torch.tensor(chain.units[::-1]), _logit(p))
            rows.append(v)
        return torch.stack(rows)


def _agent(spaces: Sequence[SearchSpace], hidden: int, run: Run) -> _Agent:
    generator = run.generator("agent")
    z = torch.randn(len(spaces), len(spaces[0].chains), hidden // 2, generator=generator)
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from global state
        torch.default_generator.manual_seed(generator.initial_seed())
        return _Agent(spaces, hidden, z)


def _logit(p: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """Inverse sigmoid, finite at 0 and 1 (Suppl. Eq. 6)."""
    return torch.logit(p.clamp(0, 1) * (1 - 2 * epsilon) + epsilon)


def _draw(shape: torch.Size, noise: Noise, generator: torch.Generator) -> torch.Tensor:
    uniform = torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    if noise == "gumbel":
        return -(-uniform.log()).log()
    return torch.logit(uniform)


@contextmanager
def _frozen(experts: Sequence[Subject]) -> Iterator[None]:
    """Train nothing but the agent: no gradients for the experts' own weights."""
    restore: list[Callable[[], object]] = []
    for expert in experts:
        for parameter in expert.denoiser.parameters():
            flag = parameter.requires_grad
            restore.append(lambda p=parameter, f=flag: p.requires_grad_(f))  # type: ignore[misc]
            parameter.requires_grad_(False)
    try:
        yield
    finally:
        # Backwards, because one denoiser may stand for several experts.
        for undo in reversed(restore):
            undo()
