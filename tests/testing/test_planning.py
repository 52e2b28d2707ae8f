"""The kit catches wrong intervals and wrong plans: one broken strategy for each promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import torch

import moediff
from moediff import Blueprint, Budget, Intervals, Plan, Run, SearchSpace, Subject, Task
from moediff.testing import ConformanceError, check_clusterer, check_gate
from tests.core.toys import Even
from tests.testing.catching import caught, units

# Clusterers


@attrs.frozen
class Cutting:
    """A clusterer that returns what it is told to make."""

    make: Any = None

    def cluster(self, subject: Subject, task: Task, run: Run) -> Any:
        return self.make(subject, run)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, r: Intervals.uniform(s.total, 2), "1 intervals that cover"),
        (lambda s, r: Intervals.uniform(1000, r.experts), r"cover \[0, 100\).*\(0, 1000\)"),
        (lambda s, r: (0, s.total), "returns Intervals"),
        (lambda s, r: Intervals.uniform(s.total, 1 + torch.rand(1) * r.experts), "random state"),
    ],
)
def test_wrong_intervals_are_caught(make: Any, message: str) -> None:
    caught(check_clusterer, Cutting(make), message)


def test_a_good_clusterer_passes() -> None:
    check_clusterer(Even())


# Gates


@attrs.frozen
class Spending:
    """Close units chain by chain until the budget is met, in every expert alike."""

    floor: bool = True
    keep: float = 1.0
    order: int = 1
    shift: int = 0

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        base, prices = experts[0], budget.counter.price(experts[0])
        space = spaces[0]
        goal = moediff.Allowance(budget, prices, (1, 1), lambda part: (0, 0))
        if self.floor:
            goal.check_floor([space, space])
        mask = torch.ones(units(base), dtype=torch.float64)
        for chain in space.chains:
            for unit in chain.units[: -1 if self.order == 1 else None][:: self.order]:
                if float(goal.cost(torch.stack([mask, mask]))) <= goal.limit * self.keep:
                    break
                mask[unit] = 0
        blueprint = Blueprint.from_mask(base.anatomy, mask)
        if self.shift:
            intervals = Intervals((0, 50, intervals.total))
        return Plan(intervals, [blueprint, blueprint])


@attrs.frozen
class Apart(Spending):
    """As the spaces want it: the two experts of the check rank their units the other way round."""

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        base = experts[0]
        goal = moediff.Allowance(
            budget, budget.counter.price(base), run.sampling.calls(base.scheduler, intervals),
            lambda part: (0, 1),
        )  # fmt: skip
        if self.floor:
            goal.check_floor(spaces)
        masks = torch.ones(2, units(base), dtype=torch.float64)
        steps = [(e, c, u) for e in (0, 1) for c in spaces[e].chains for u in c.units[:-1]]
        for expert, _, unit in steps:
            if float(goal.cost(masks)) <= goal.limit * self.keep:
                break
            masks[expert, unit] = 0
        cut = [Blueprint.from_mask(base.anatomy, mask) for mask in masks]
        return Plan(intervals, cut, {moediff.plan.REST: (0, 1)})


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Apart(keep=1.3), "the plan fits the budget of 0.75"),
        (Apart(floor=False, keep=1.0), "refuses a budget under the floor"),
        (Spending(), "chain .* is removed from its start|what its space offers"),
        (Spending(shift=1), "keeps the intervals"),
    ],
)
def test_wrong_plans_are_caught(gate: Any, message: str) -> None:
    caught(check_gate, gate, message)


def test_a_gate_that_refuses_what_can_be_reached_is_caught() -> None:
    @attrs.frozen
    class Fearful:
        """Refuses every budget."""

        def allocate(self, *arguments: Any) -> Plan:
            raise moediff.errors.BudgetError("no")

    caught(check_gate, Fearful(), "spends a budget. Found: refused: no")


def test_a_good_gate_passes() -> None:
    check_gate(Apart())


@attrs.frozen
class StoredOnly:
    """Spends no budget of live cost; whether it says so is up to the test."""

    refuses: bool = True

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        if self.refuses and budget.of != "stored":
            raise moediff.errors.OptionError("give a budget of stored cost")
        return Apart().allocate(experts, spaces, intervals, budget, task, run)


def test_a_gate_may_spend_one_kind_of_budget_if_it_refuses_the_other() -> None:
    check_gate(StoredOnly(), of=("stored",))
    caught(check_gate, StoredOnly(), "spends a budget. Found: refused: give a budget of stored")
    with pytest.raises(ConformanceError, match="spends no budget of live cost"):
        check_gate(StoredOnly(refuses=False), of=("stored",))


@attrs.frozen
class Merging(Apart):
    """Makes one of experts that were trained apart."""

    def allocate(self, experts: Sequence[Subject], *others: Any) -> Plan:
        plan = super().allocate(experts, *others)
        apart = experts[0].denoiser is not experts[1].denoiser
        return attrs.evolve(plan, blueprints=plan.blueprints[:1] * 2, copies={}) if apart else plan


def test_a_gate_that_merges_what_was_trained_apart_is_caught() -> None:
    caught(check_gate, Merging(), "experts trained apart share no layer")
