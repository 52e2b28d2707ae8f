"""The kit catches wrong spaces, mixtures and counts: one broken strategy for each promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import nn

from moediff import (
    Blueprint,
    Chain,
    Cost,
    CostModel,
    ExpertMixture,
    Plan,
    Scores,
    SearchSpace,
    Subject,
)
from moediff.testing import check_counter, check_pruner
from moediff.testing.tiny import Elements
from tests.core.toys import Layers
from tests.testing.catching import caught, leave_hook

# Pruners


@attrs.frozen
class Pruning(Layers):
    """A pruner whose space can be spoilt."""

    spoil: str = ""

    def space(self, expert: Subject, scores: Scores) -> SearchSpace:
        chains = super().space(expert, scores).chains
        match self.spoil:
            case "twice":
                chains = (*chains, Chain("again", chains[0].units[:1]))
            case "strange":
                chains = (Chain("layers", (*chains[0].units, 9999)),)
            case "empty":
                chains = (*chains, Chain("none", ()))
            case "nothing":
                chains = (Chain("layers", chains[0].units[:1]),)
            case "lengths":
                chains = (Chain("layers", chains[0].units[: 3 + int(scores.values[0])]),)
            case "hook":
                leave_hook(expert, None, None)  # type: ignore[arg-type]
        return SearchSpace(expert.anatomy, chains, scores)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("twice", "chains are disjoint"),
        ("strange", "chains hold the anatomy's units"),
        ("empty", "chains hold units. Found: none in none"),
        ("nothing", "something may be removed"),
        ("lengths", "chains of the same names and lengths whatever the scores"),
        ("hook", "leaves the hooks as found"),
    ],
)
def test_wrong_spaces_are_caught(spoil: str, message: str) -> None:
    caught(check_pruner, Pruning(spoil), message)


@attrs.frozen
class Carving(Layers):
    """A pruner whose mixture can be spoilt."""

    spoil: str = ""

    def prune(self, experts: Sequence[Subject], plan: Plan) -> Any:
        match self.spoil:
            case "whole":
                whole = Plan(plan.intervals, [Blueprint()] * 2, plan.copies)
                mixture = ExpertMixture.from_experts(experts, whole)
                mixture.plan = plan
            case "other plan":
                whole = Plan(plan.intervals, [Blueprint()] * 2)
                mixture = ExpertMixture.from_experts(experts, whole)
            case "borrowed":
                mixture = ExpertMixture.from_experts(experts, plan)
                for expert in mixture.experts:
                    expert.conv_in = experts[0].denoiser.conv_in
            case "moved":
                mixture = ExpertMixture.from_experts(experts, plan)
                with torch.no_grad():
                    mixture.experts[0].conv_out.bias += 0.1
            case "unshared":
                import copy

                mixture = ExpertMixture.from_experts(experts, plan)
                mixture.experts[1] = copy.deepcopy(mixture.experts[1])
            case "module":
                return nn.ModuleList([e.denoiser for e in experts])
        return mixture


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("whole", "parameters are left"),
        ("other plan", "the mixture carries its plan"),
        ("borrowed", "the mixture owns its weights"),
        ("moved", "computes what the cut denoiser computes"),
        ("unshared", "is one object, as the plan shares it"),
        ("module", "returns an ExpertMixture. Found: ModuleList"),
    ],
)
def test_wrong_mixtures_are_caught(spoil: str, message: str) -> None:
    caught(check_pruner, Carving(spoil), message)


def test_a_good_pruner_passes() -> None:
    check_pruner(Layers())


# Counters


@attrs.frozen
class Counting:
    """A counter that can be spoilt."""

    spoil: str = ""

    def count(self, denoiser: nn.Module, shape: Sequence[int] | None = None) -> Cost:
        cost = Elements().count(denoiser)
        match self.spoil:
            case "free":
                return Cost(0.0, "elements")
            case "no unit":
                return Cost(cost.value, "")
            case "shape":
                return Cost(cost.value * (1 if shape is None else 2), "elements")
            case "trains":
                denoiser.train()
        return cost

    def price(self, subject: Subject) -> CostModel:
        model = Elements().price(subject)
        match self.spoil:
            case "no fixed part":
                # DiffPruning's print: the whole layer is divided among its units.
                return attrs.evolve(model, units=model.units * 1.01)
            case "dropped for free":
                return attrs.evolve(model, bypass=model.bypass * 0)
            case "other unit":
                return attrs.evolve(model, unit="bytes")
        return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("free", "a positive cost with a unit"),
        ("no unit", "a positive cost with a unit"),
        ("shape", "the shape in the config is the default"),
        ("trains", "leaves train and eval mode as found"),
        ("no fixed part", "the prices add up to the count"),
        ("dropped for free", r"the price of Blueprint\(drop=.* is its count"),
        ("other unit", "price returns a CostModel in elements"),
    ],
)
def test_wrong_counts_are_caught(spoil: str, message: str) -> None:
    caught(check_counter, Counting(spoil), message)


def test_a_tolerance_lets_measured_prices_pass() -> None:
    check_counter(Counting())
    check_counter(Counting("no fixed part"), tolerance=0.02)
