"""Checks of the roles that plan: scorers, clusterers, gates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from moediff.cost import Budget
from moediff.errors import BudgetError, OptionError, PlanError
from moediff.plan import Plan
from moediff.roles import (
    Clusterer,
    Gate,
    Scorer,
)
from moediff.space import Scores, SearchSpace
from moediff.subject import Subject
from moediff.testing import tiny
from moediff.testing.promises import (
    ConformanceError,
    check_value,
    failing,
    promise,
    repeated,
    settled,
    untouched,
)
from moediff.timesteps import Intervals


def check_scorer(strategy: Any) -> None:
    """Finite scores (U,), repeatable, and the subject as it was found.

    Raises:
        ConformanceError: a promise is broken.
    """
    check_value(strategy, (Scorer,))
    for kind in tiny.KINDS:

        def score(subject: Subject, kind: str = kind) -> Scores:
            task = tiny.tiny_task(kind)
            with untouched(strategy, subject, data=[task]):
                scores: Scores = strategy.score(subject, task, tiny.tiny_run(kind))
            return scores

        def compute(kind: str = kind, score: Callable[[Subject], Scores] = score) -> Scores:
            return score(attrs.evolve(tiny.tiny_subject(kind), interval=tiny.CUTS[:2]))

        with settled():
            scores = repeated(strategy, compute, _values)
            values = scores.values
            units = len(tiny.tiny_subject(kind).anatomy.units)
            shape = f"scores of shape ({units},)"
            promise(values.shape == (units,), strategy, shape, str(tuple(values.shape)))
            promise(values.is_floating_point(), strategy, "scores are floats", str(values.dtype))
            promise(bool(values.isfinite().all()), strategy, "scores are finite", "some are not")
            promise(not values.requires_grad, strategy, "scores hold no graph", "one")
            failing(strategy, lambda kind=kind: tiny.tiny_subject(kind), score)  # type: ignore[misc]


def _values(scores: Any) -> Any:
    if not isinstance(scores, Scores):
        raise ConformanceError(f"promised: score returns Scores. Found: {type(scores).__name__}.")
    return scores.values


def check_clusterer(strategy: Any) -> None:
    """`run.experts` intervals that cover [0, T).

    Raises:
        ConformanceError: a promise is broken.
    """
    check_value(strategy, (Clusterer,))
    for kind, count in (("plain", 1), ("plain", 2), ("conditional", 3)):

        def cluster(subject: Subject, kind: str = kind, count: int = count) -> Intervals:
            task = tiny.tiny_task(kind)
            with untouched(strategy, subject, data=[task]):
                found: Intervals = strategy.cluster(subject, task, tiny.tiny_run(kind, count))
            return found

        with settled():
            intervals = repeated(
                strategy,
                lambda kind=kind, cluster=cluster: cluster(tiny.tiny_subject(kind)),  # type: ignore[misc]
                lambda found: found,
            )
            right = isinstance(intervals, Intervals)
            promise(right, strategy, "returns Intervals", type(intervals).__name__)
            promise(
                len(intervals) == count and intervals.total == tiny.TIMESTEPS,
                strategy,
                f"{count} intervals that cover [0, {tiny.TIMESTEPS})",
                str(intervals.cuts),
            )
            failing(strategy, lambda kind=kind: tiny.tiny_subject(kind), cluster)  # type: ignore[misc]


def check_gate(strategy: Any, of: Sequence[str] = ("live", "stored"), ordered: bool = True) -> None:
    """A plan that fits the budget and the search spaces; a budget under the floor is refused.

    Args:
        strategy: the gate.
        of: the kinds of budget that it spends. One that it does not spend is refused.
        ordered: whether it removes each chain from its start. Otherwise it learns an order of its
            own, and only the end of each chain stays for certain.

    Raises:
        ConformanceError: a promise is broken.
    """
    check_value(strategy, (Gate,))
    floor = 1e-4  # of a budget that nothing can reach
    for value, kind in ((0.75, "live"), (0.95, "stored"), (floor, "live"), (floor, "stored")):
        budget = Budget(value, tiny.Elements(), kind)  # type: ignore[arg-type]

        def allocate(subject: Subject, budget: Budget = budget) -> Plan | None:
            task, intervals = tiny.tiny_task(), Intervals(tiny.CUTS)
            experts = subject.split(intervals)
            spaces = [tiny.tiny_space(subject), tiny.tiny_space(subject, flip=True)]
            run = tiny.tiny_run()
            try:
                with untouched(strategy, subject, data=[task, *(s.scores for s in spaces)]):
                    plan: Plan = strategy.allocate(experts, spaces, intervals, budget, task, run)
            except OptionError as error:
                promise(budget.of not in of, strategy, "spends a budget", f"refused: {error}")
                return None
            except BudgetError as error:
                promise(budget.value == floor, strategy, "spends a budget", f"refused: {error}")
                return None
            found = f"a plan for {budget.value}"
            text = f"spends no budget of {budget.of} cost"
            promise(budget.of in of, strategy, text, found)
            promise(budget.value > floor, strategy, "refuses a budget under the floor", found)
            _check_plan(strategy, plan, subject, spaces, intervals, budget, ordered)
            return plan

        with settled():
            repeated(
                strategy,
                lambda allocate=allocate: allocate(tiny.tiny_subject()),  # type: ignore[misc]
                lambda plan: plan and plan.to_json(),
            )
            failing(strategy, tiny.tiny_subject, allocate)
    with settled():
        _check_separate(strategy, of[0])


def _check_separate(strategy: Any, of: str) -> None:
    """Experts that a tuner has made separate share nothing, or are refused."""
    subject, intervals = tiny.tiny_subject(), Intervals(tiny.CUTS)
    experts = [
        attrs.evolve(expert, denoiser=copy.deepcopy(expert.denoiser))
        for expert in subject.split(intervals)
    ]
    spaces = [tiny.tiny_space(subject)] * len(experts)
    budget = Budget(0.75, tiny.Elements(), of)  # type: ignore[arg-type]
    try:
        plan = strategy.allocate(
            experts, spaces, intervals, budget, tiny.tiny_task(), tiny.tiny_run()
        )
        plan.check_separate(subject.anatomy, [expert.denoiser for expert in experts])
    except PlanError as error:
        promise(False, strategy, "experts trained apart share no layer", str(error))
    except (OptionError, BudgetError):
        return


def _check_plan(
    strategy: Any,
    plan: Any,
    subject: Subject,
    spaces: Sequence[SearchSpace],
    intervals: Intervals,
    budget: Budget,
    ordered: bool,
) -> None:
    promise(isinstance(plan, Plan), strategy, "returns a Plan", type(plan).__name__)
    promise(plan.intervals == intervals, strategy, "keeps the intervals", str(plan.intervals.cuts))
    plan.check(subject.anatomy)
    prices = budget.counter.price(subject)
    share = plan.cost(prices, tiny.tiny_run().sampling)[budget.of] / prices.full
    text = f"the plan fits the budget of {budget.value} ({budget.of})"
    promise(share <= budget.value * 1.01, strategy, text, f"a share of {share:.4f}")
    for index, (space, mask) in enumerate(
        zip(spaces, plan.masks(subject.anatomy).tolist(), strict=True)
    ):
        free = {u for chain in space.chains for units in chain.steps[:-1] for u in units}
        taken = {unit for unit, kept in enumerate(mask) if not kept} - free
        names = ", ".join(subject.anatomy.units[unit].name for unit in sorted(taken))
        promise(not taken, strategy, f"expert {index} loses what its space offers", names)
        for chain in space.chains:
            kept = [mask[unit] for unit in chain.units]
            text = f"expert {index}'s chain {chain.name} is removed from its start"
            promise(kept == sorted(kept) or not ordered, strategy, text, str(kept))
            split = [units for units in chain.steps if len({mask[unit] for unit in units}) > 1]
            text = f"expert {index}'s chain {chain.name} is removed {chain.stride} at a time"
            promise(not split, strategy, text, f"{split} kept in part")
