"""Strategies of a few lines, with which the core is tested without any plugin's strategies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import nn

import moediff
from moediff import (
    Blueprint,
    Budget,
    Chain,
    Cost,
    CostModel,
    ExpertMixture,
    Intervals,
    Plan,
    Recipe,
    Run,
    Sampling,
    Scores,
    SearchSpace,
    Subject,
    Task,
)
from moediff.plan import REST
from moediff.roles import Rank
from moediff.subject import apart
from moediff.testing.tiny import Elements

CALLS: Counter[str] = Counter()
"""How often each toy did its work; the tests clear it."""


@attrs.frozen
class Draw:
    """Random scores."""

    scale: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        CALLS["score"] += 1
        run.spend(samples=7)
        values = self.scale * torch.rand(len(expert.anatomy.units), generator=run.generator("draw"))
        run.record("values", values)
        return Scores(values)


@attrs.frozen
class PerInterval:
    """Scores that depend on the expert's interval."""

    needs: ClassVar[frozenset[str]] = frozenset({"intervals"})

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        CALLS["score"] += 1
        return Scores(torch.arange(1.0, len(expert.anatomy.units) + 1) + expert.interval[0])


@attrs.frozen
class Even:
    """Intervals of equal length."""

    provides: ClassVar[frozenset[str]] = frozenset({"intervals"})

    def cluster(self, subject: Subject, task: Task, run: Run) -> Intervals:
        CALLS["cluster"] += 1
        return Intervals.uniform(subject.total, run.experts)


@attrs.frozen
class Greedy:
    """Drop layers by score until the budget is met; the last interval gets copies of its own."""

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        CALLS["allocate"] += 1
        prices, mask = budget.counter.price(experts[0]), torch.ones(len(experts[0].anatomy.units))
        for unit in spaces[0].chains[0].units[:-1]:
            if float(prices.experts(mask)) <= budget.value * prices.full:
                break
            mask[unit] = 0
        blueprint = Blueprint.from_mask(experts[0].anatomy, mask)
        numbers = (0,) * (len(intervals) - 1) + (1 if len(intervals) > 1 else 0,)
        names = [layer.name for layer in experts[0].anatomy.layers]
        if apart(experts):  # a tuner made them separate
            names, numbers = [REST], tuple(range(len(intervals)))
        return Plan(intervals, [blueprint] * len(intervals), dict.fromkeys(names, numbers))


@attrs.frozen
class Layers:
    """One chain with every layer."""

    def space(self, expert: Subject, scores: Scores) -> SearchSpace:
        units = sorted(expert.anatomy.layer_units.values(), key=scores.values.tolist().__getitem__)
        return SearchSpace(expert.anatomy, (Chain("layers", tuple(units)),), scores)

    def prune(self, experts: Sequence[Subject], plan: Plan) -> ExpertMixture:
        CALLS["prune"] += 1
        return ExpertMixture.from_experts(experts, plan)


@attrs.frozen
class Count(Elements):
    """Parameters, and how often they were counted."""

    def count(self, denoiser: nn.Module, shape: Sequence[int] | None = None) -> Cost:
        CALLS["count"] += 1
        return Elements().count(denoiser, shape)

    def price(self, subject: Subject) -> CostModel:
        return Elements().price(subject)


@attrs.frozen
class Nudge:
    """Move all weights a little: experts apart before, mixtures after the pruning."""

    amount: float = 0.01

    def prepare(
        self, experts: Sequence[Subject], rank: Rank, intervals: Intervals, task: Task, run: Run
    ) -> Sequence[Subject]:
        import copy

        CALLS["prepare"] += 1
        rank(experts[0])
        tuned = [attrs.evolve(e, denoiser=copy.deepcopy(e.denoiser)) for e in experts]
        for index, expert in enumerate(tuned):
            self._move(expert.denoiser, run.generator(f"prepare {index}"))
        return tuned

    def recover(
        self, mixture: ExpertMixture, task: Task, teacher: Subject, run: Run
    ) -> ExpertMixture:
        CALLS["recover"] += 1
        self._move(mixture.untie(), run.generator("recover"))
        run.spend(steps=1)
        return mixture

    def _move(self, module: nn.Module, generator: torch.Generator) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += self.amount * torch.randn(parameter.shape, generator=generator)


@attrs.frozen
class Failing:
    """A gate that draws, trains, consumes and then fails."""

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        torch.rand(3)
        net = experts[0].denoiser.train()
        net(task.samples[:1], 3).sample.sum().backward()
        raise RuntimeError("the gate broke")


def recipe(**changes: Any) -> Recipe:
    """A recipe of toys."""
    parts: dict[str, Any] = {
        "scorer": Draw(),
        "clusterer": Even(),
        "gate": Greedy(),
        "pruner": Layers(),
        "budget": Budget(0.7, Count()),
        "sampling": Sampling(steps=4),
    }
    return Recipe(**{**parts, **changes})


class ToyPlugin:
    """All toys as a plugin."""

    @staticmethod
    @moediff.hookimpl
    def scorers() -> dict[str, type]:
        return {"draw": Draw, "per-interval": PerInterval}

    @staticmethod
    @moediff.hookimpl
    def clusterers() -> dict[str, type]:
        return {"even": Even}

    @staticmethod
    @moediff.hookimpl
    def gates() -> dict[str, type]:
        return {"greedy": Greedy}

    @staticmethod
    @moediff.hookimpl
    def pruners() -> dict[str, type]:
        return {"layers": Layers}

    @staticmethod
    @moediff.hookimpl
    def counters() -> dict[str, type]:
        return {"count": Count}

    @staticmethod
    @moediff.hookimpl
    def tuners() -> dict[str, type]:
        return {"nudge": Nudge}

    @staticmethod
    @moediff.hookimpl
    def recipes() -> dict[str, Any]:
        return {
            "toy": {
                "scorer": {"name": "draw", "scale": 2.0},
                "clusterer": {"name": "even"},
                "gate": {"name": "greedy"},
                "pruner": {"name": "layers"},
                "recover": {"name": "nudge", "amount": 0.1},
                "budget": {"value": 0.5, "counter": {"name": "count"}},
                "experts": 3,
                "sampling": {"scheduler": "ddim", "steps": 7},
            }
        }
