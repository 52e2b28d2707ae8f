"""Checks of the roles that build and price sub-networks: pruners and counters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from moediff import surgery
from moediff.cost import Cost, CostModel
from moediff.mixture import ExpertMixture
from moediff.plan import Blueprint, Plan
from moediff.roles import (
    BudgetCounter,
    Pruner,
)
from moediff.space import SearchSpace
from moediff.subject import Subject
from moediff.testing import tiny
from moediff.testing.anatomies import close, example
from moediff.testing.promises import (
    check_value,
    promise,
    repeated,
    settled,
    untouched,
)
from moediff.timesteps import Intervals


def check_pruner(strategy: Any) -> None:
    """Disjoint chains of the anatomy's units, and a mixture that is what the plan says.

    Raises:
        ConformanceError: a promise is broken.
    """
    check_value(strategy, (Pruner,))
    for kind in tiny.KINDS:
        with settled():
            subject = tiny.tiny_subject(kind)

            def spaces_of(subject: Subject = subject) -> list[Any]:
                with untouched(strategy, subject):
                    scores = [tiny.tiny_scores(subject, flip) for flip in (False, True)]
                    found = [strategy.space(subject, given) for given in scores]
                _check_spaces(strategy, found, subject)
                return found

            spaces = repeated(strategy, spaces_of, lambda found: [space.chains for space in found])
            smallest = spaces[0].smallest()
            same = Plan(
                Intervals(tiny.CUTS),
                [Blueprint.from_mask(subject.anatomy, smallest)] * 2,
            )
            for plan in (same, tiny.tiny_plan(subject)):
                _check_prune(strategy, subject, plan)


def _check_spaces(strategy: Any, spaces: Sequence[Any], subject: Subject) -> None:
    for space in spaces:
        right = isinstance(space, SearchSpace)
        promise(right, strategy, "returns a SearchSpace", type(space).__name__)
        units = [unit for chain in space.chains for unit in chain.units]
        repeats = sorted({unit for unit in units if units.count(unit) > 1})
        promise(not repeats, strategy, "chains are disjoint", f"units {repeats} in two of them")
        strange = [u for u in units if u not in range(len(subject.anatomy.units))]
        promise(not strange, strategy, "chains hold the anatomy's units", f"{strange}")
        empty = [chain.name for chain in space.chains if not chain.units]
        promise(not empty, strategy, "chains hold units", f"none in {', '.join(empty)}")
        promise(space.removable > 0, strategy, "something may be removed", "nothing")
    shapes = [[(c.name, len(c.units), c.stride) for c in space.chains] for space in spaces]
    text = "chains of the same names and lengths whatever the scores"
    promise(shapes[0] == shapes[1], strategy, text, f"{shapes[0]} and {shapes[1]}")


def _check_prune(strategy: Any, subject: Subject, plan: Plan) -> None:
    experts = subject.split(plan.intervals)
    with untouched(strategy, subject):
        mixture = strategy.prune(experts, plan)
    right = isinstance(mixture, ExpertMixture)
    promise(right, strategy, "returns an ExpertMixture", type(mixture).__name__)
    promise(mixture.plan == plan, strategy, "the mixture carries its plan", "another one")
    own = {parameter.data_ptr() for parameter in subject.denoiser.parameters()}
    borrowed = [n for n, p in mixture.named_parameters() if p.numel() and p.data_ptr() in own]
    promise(not borrowed, strategy, "the mixture owns its weights", f"{borrowed[:3]} of the base")
    sample, inputs = example(subject.denoiser, 2)
    for (low, _), expert, blueprint in zip(
        plan.intervals, mixture.experts, plan.blueprints, strict=True
    ):
        cut = surgery.cut(subject.denoiser, subject.anatomy, blueprint)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (cut, expert)]
        promise(sizes[0] == sizes[1], strategy, f"{sizes[0]} parameters are left", f"{sizes[1]}")
        with torch.no_grad():
            wanted, got = (net(sample, low, **inputs).sample for net in (cut, mixture))
        close(strategy, "computes what the cut denoiser computes", wanted, got)
    numbers = {layer.name: plan.copy_numbers(layer.name) for layer in subject.anatomy.layers}
    for layer in subject.anatomy.layers:
        first, second = (expert.get_submodule(layer.modules[0]) for expert in mixture.experts)
        if numbers[layer.name] == (0, 0):
            text = f"{layer.name} is one object, as the plan shares it"
            promise(first is second, strategy, text, "two")


def check_counter(strategy: Any, tolerance: float = 1e-6) -> None:
    """Positive costs with a unit; the price of every sub-network equals its count.

    Args:
        strategy: the counter.
        tolerance: how far, relative to the base model's cost, a price may miss a count. More
            than the default is for counters that measure, such as a latency.

    Raises:
        ConformanceError: a promise is broken.
    """
    check_value(strategy, (BudgetCounter,))
    for kind in tiny.KINDS:
        with settled():
            subject = tiny.tiny_subject(kind)
            with untouched(strategy, subject):
                cost = strategy.count(subject.denoiser)
                again = strategy.count(subject.denoiser, subject.shape)
                prices = strategy.price(subject)
            promise(isinstance(cost, Cost), strategy, "count returns a Cost", type(cost).__name__)
            fine = math.isfinite(cost.value) and cost.value > 0 and bool(cost.unit)
            promise(fine, strategy, "a positive cost with a unit", f"{cost.value} {cost.unit!r}")
            _agree(strategy, "the shape in the config is the default", cost, again.value, tolerance)
            right = isinstance(prices, CostModel) and prices.unit == cost.unit
            promise(right, strategy, f"price returns a CostModel in {cost.unit}", repr(prices)[:60])
            _agree(strategy, "the prices add up to the count", cost, prices.full, tolerance)
            for blueprint in tiny.tiny_blueprints(subject, single=kind == "plain"):
                smaller = surgery.cut(subject.denoiser, subject.anatomy, blueprint)
                counted = strategy.count(smaller)
                priced = float(prices.experts(blueprint.mask(subject.anatomy)))
                text = f"the price of {blueprint} is its count"
                promise(
                    abs(priced - counted.value) <= tolerance * cost.value,
                    strategy,
                    text,
                    f"{priced} priced, {counted.value} counted",
                )


def _agree(strategy: Any, text: str, cost: Cost, value: float, tolerance: float) -> None:
    close = math.isclose(cost.value, value, rel_tol=tolerance)
    promise(close, strategy, text, f"{cost.value} and {value}")
