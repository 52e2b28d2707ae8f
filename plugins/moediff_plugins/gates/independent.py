"""Masks that know nothing of each other: the Baseline of DiffPruning's ablation (Table 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from attrs.validators import ge, gt, in_, instance_of
from torch import nn

from moediff.cost import Budget
from moediff.plan import Plan
from moediff.space import SearchSpace
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.gates.soft import Noise, allowance_of, learn, logit


@attrs.frozen
class Independent:
    """Train one logit per unit and expert, with the ERA's loss and nothing else of it (Sec. 4.2).

    The naive parameterisation v = sigmoid((b + n) / tau); the print has -(b + n), which names b
    the other way round. There is no order of importance: which units of a chain stay is learned,
    except for the last of each chain, which always stays. With `experts=1` it is the paper's
    Baseline, with more the rung "+ Mixture of Experts".

    Records: see `soft.learn`.

    Attributes:
        steps: see `soft.Settings` for this field and those that follow.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prices"})

    steps: int = attrs.field(default=1000, validator=[instance_of(int), ge(1)])
    batch: int = attrs.field(default=32, validator=[instance_of(int), ge(1)])
    learning_rate: float = attrs.field(default=1e-2, validator=gt(0))
    weight_decay: float = attrs.field(default=0.0, validator=ge(0))
    temperature: float = attrs.field(default=0.4, validator=gt(0))
    noise: Noise = attrs.field(default="logistic", validator=in_(("logistic", "gumbel")))
    penalty: float = attrs.field(default=1.0, validator=gt(0))
    save_every: int = attrs.field(default=500, validator=[instance_of(int), ge(1)])

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
        logits = _Logits(spaces)
        return learn(
            self, "independent", logits, experts, spaces, intervals, allowance, task, run,
            ordered=False,
        )  # fmt: skip


class _Logits(nn.Module):
    """One logit per step of every chain; what cannot be removed has a large one."""

    place: torch.Tensor
    free: torch.Tensor

    def __init__(self, spaces: Sequence[SearchSpace]) -> None:
        super().__init__()
        place = torch.zeros(len(spaces), len(spaces[0].anatomy.units), dtype=torch.long)
        free = torch.zeros(place.shape, dtype=torch.bool)
        count = 0
        for expert, space in enumerate(spaces):
            for chain in space.chains:
                for units in chain.steps[:-1]:
                    place[expert, list(units)] = count
                    free[expert, list(units)] = True
                    count += 1
        self.register_buffer("place", place)  # (N, U)
        self.register_buffer("free", free)  # (N, U)
        self.values = nn.Parameter(torch.zeros(count))

    def forward(self) -> torch.Tensor:
        """Logits v (N, U) of keeping every unit."""
        return torch.where(self.free, self.values[self.place], logit(torch.ones(())))
