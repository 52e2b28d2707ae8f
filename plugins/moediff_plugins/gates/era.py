"""The Expert Routing Agent: learn all experts' widths and depths together (DiffPruning 3.5-3.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import attrs
import torch
from attrs.validators import ge, gt, in_, instance_of
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from moediff.allowance import Allowance
from moediff.cost import Budget
from moediff.plan import Plan
from moediff.space import SearchSpace
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.gates.soft import Noise, allowance_of, learn, logit

SPREAD = 0.2
"""How soft the start at the budget is: p falls from 73 to 27 % over twice this share of a chain."""


@attrs.frozen
class ERA:
    """Train a GRU that predicts every keep probability from fixed noise (DiffPruning Eq. 6-15).

    Two departures from the print, both for a reason. Eq. 7 adds one Gumbel(0, 1) draw, which keeps
    63 % at v = 0; the difference of two of them, a logistic draw, keeps 50 % (Maddison et al.,
    2017), and `noise="gumbel"` is the print. The supplement's sum starts at e + 1, so the last
    unit could never stay; here it starts at e, so the first one always does.

    Eq. 15 adds R with weight 1. As R has a kink at the budget, the cost settles exactly there while
    the loss falls by less than 1 as the logarithm of the cost rises by 1, so after elastic tuning.
    Where experts break when they are cut (a low budget, no elastic tuning) the loss wins, the
    softmax saturates and the cost stays above: `gap` says so, and a larger `penalty` mends it.

    Records: see `soft.learn`.

    Attributes:
        steps: see `soft.Settings` for this field and those that follow.
        hidden: the GRU's width; its input is half as wide.
        start: "even" draws the dense layers as usual, which keeps about half of every chain;
            "budget" shifts their biases so that the first plan costs what it should. That helps
            where steps are few.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prices"})

    steps: int = attrs.field(default=1000, validator=[instance_of(int), ge(1)])
    batch: int = attrs.field(default=32, validator=[instance_of(int), ge(1)])
    learning_rate: float = attrs.field(default=1e-3, validator=gt(0))
    weight_decay: float = attrs.field(default=0.01, validator=ge(0))
    temperature: float = attrs.field(default=0.4, validator=gt(0))
    noise: Noise = attrs.field(default="logistic", validator=in_(("logistic", "gumbel")))
    penalty: float = attrs.field(default=1.0, validator=gt(0))
    save_every: int = attrs.field(default=500, validator=[instance_of(int), ge(1)])
    hidden: int = attrs.field(default=256, validator=[instance_of(int), ge(2)])
    start: Literal["even", "budget"] = attrs.field(
        default="even", validator=in_(("even", "budget"))
    )

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        allowance = allowance_of(experts, spaces, intervals, budget, run)
        agent = _agent(spaces, self.hidden, run)
        if self.start == "budget":
            _start_at(agent, allowance)
        return learn(self, "era", agent, experts, spaces, intervals, allowance, task, run)


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
            weight_norm(nn.Linear(hidden, len(chain.steps))) for chain in spaces[0].chains
        )

    def forward(self) -> torch.Tensor:
        """Logits v (N, U) of keeping every unit; large where nothing can be removed."""
        states = self.gru(self.z)[0].relu()  # (N, K, hidden)
        bound = logit(torch.ones(()))
        rows = []
        for expert, space in enumerate(self.spaces):
            v = bound.repeat(len(space.anatomy.units))
            for k, chain in enumerate(space.chains):
                o = self.heads[k](states[expert, k])  # (W,), the most important first
                y = torch.softmax(o, dim=-1)
                p = y.flip(-1).cumsum(-1)  # p_e = sum of y_w over w >= e, in order of removal
                lengths = torch.tensor([len(units) for units in chain.steps])
                v = v.index_copy(0, torch.tensor(chain.units), logit(p).repeat_interleave(lengths))
            rows.append(v)
        return torch.stack(rows)


def _agent(spaces: Sequence[SearchSpace], hidden: int, run: Run) -> _Agent:
    generator = run.generator("agent")
    z = torch.randn(len(spaces), len(spaces[0].chains), hidden // 2, generator=generator)
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from global state
        torch.default_generator.manual_seed(generator.initial_seed())
        return _Agent(spaces, hidden, z)


@torch.no_grad()
def _start_at(agent: _Agent, allowance: Allowance) -> None:
    """Shift the heads' biases so that all chains keep about one share, which meets the budget."""
    biases = [head.get_parameter("bias") for head in agent.heads]
    drawn = [bias.clone() for bias in biases]
    low, high = -1.0, 2.0
    for _ in range(20):
        share = (low + high) / 2
        for bias, first in zip(biases, drawn, strict=True):
            positions = torch.arange(len(bias)) / len(bias)  # (W,), the most important first
            p = torch.sigmoid((share - positions) / SPREAD)
            y = p - torch.cat([p[1:], torch.zeros(1)])
            bias.copy_(first + y.clamp(min=1e-4).log())
        if float(allowance.cost(agent().sigmoid().double())) > allowance.limit:
            high = share
        else:
            low = share
