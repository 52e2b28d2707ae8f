"""Recipes: refused when they are built, never while they run."""

from __future__ import annotations

from typing import ClassVar

import attrs
import pytest

from moediff import Budget
from moediff.errors import IncompatibleError, OptionError
from tests.core.toys import (
    Count,
    Draw,
    Even,
    Greedy,
    Layers,
    PerInterval,
    recipe,
)  # fmt: skip


@pytest.mark.parametrize("field", ["scorer", "clusterer", "gate", "pruner", "prepare", "recover"])
def test_a_class_instead_of_an_instance(field: str) -> None:
    with pytest.raises(OptionError, match=f"{field}: got the class Draw; pass an instance"):
        recipe(**{field: Draw})


def test_a_counter_class_instead_of_an_instance() -> None:
    with pytest.raises(OptionError, match="counter: got the class Count; pass an instance"):
        recipe(budget=Budget(0.5, Count))


@pytest.mark.parametrize(
    ("field", "role"),
    [
        ("scorer", "Scorer"),
        ("clusterer", "Clusterer"),
        ("gate", "Gate"),
        ("pruner", "Pruner"),
        ("prepare", "ExpertTuner or None"),
        ("recover", "MixtureTuner or None"),
    ],
)
def test_a_strategy_of_another_role(field: str, role: str) -> None:
    wrong = Even() if field != "clusterer" else Draw()
    with pytest.raises(OptionError, match=f"{field}: got .*which is no {role}"):
        recipe(**{field: wrong})


def test_required_components_may_not_be_none() -> None:
    with pytest.raises(OptionError, match="gate: got None, which is no Gate"):
        recipe(gate=None)
    with pytest.raises(OptionError, match="counter: got None, which is no BudgetCounter"):
        recipe(budget=Budget(0.5, None))
    with pytest.raises(OptionError, match=r"budget: got 0\.5; pass a Budget"):
        recipe(budget=0.5)


@attrs.frozen
class Demanding(Greedy):
    """A gate that needs two words."""

    needs: ClassVar[frozenset[str]] = frozenset({"widths", "prices"})


@attrs.frozen
class WithWidths(Layers):
    """A pruner that provides one of them."""

    provides: ClassVar[frozenset[str]] = frozenset({"widths"})


@attrs.frozen
class WithPrices(Count):
    """A counter that provides the other one."""

    provides: ClassVar[frozenset[str]] = frozenset({"prices"})


def test_needs_that_nobody_provides_are_refused_with_the_reason() -> None:
    with pytest.raises(
        IncompatibleError, match="gate: Demanding needs prices, widths, which no other"
    ):
        recipe(gate=Demanding())
    with pytest.raises(
        IncompatibleError, match=r"needs prices, .*they provide intervals, live, widths"
    ):
        recipe(gate=Demanding(), pruner=WithWidths())
    whole = recipe(gate=Demanding(), pruner=WithWidths(), budget=Budget(0.5, WithPrices()))
    assert whole.gate == Demanding()


def test_a_budget_provides_what_it_is_of() -> None:
    @attrs.frozen
    class Hoarder(Greedy):
        """A gate that spends stored cost alone."""

        needs: ClassVar[frozenset[str]] = frozenset({"stored"})

    with pytest.raises(IncompatibleError, match=r"Hoarder needs stored, .*what the budget is `of`"):
        recipe(gate=Hoarder())
    assert recipe(gate=Hoarder(), budget=Budget(0.5, Count(), of="stored")).budget.of == "stored"


def test_a_strategy_does_not_provide_for_itself() -> None:
    @attrs.frozen
    class Selfish(Demanding):
        """Needs what it provides."""

        provides: ClassVar[frozenset[str]] = frozenset({"widths", "prices"})

    with pytest.raises(IncompatibleError, match="Selfish needs prices, widths"):
        recipe(gate=Selfish())


def test_evolve_swaps_one_component_and_checks_again() -> None:
    swapped = attrs.evolve(recipe(), scorer=PerInterval())
    assert (swapped.scorer, swapped.gate) == (PerInterval(), recipe().gate)
    with pytest.raises(OptionError, match="pass an instance"):
        attrs.evolve(recipe(), scorer=PerInterval)


def test_recipes_are_values() -> None:
    assert recipe() == recipe()
    assert recipe() != recipe(seed=1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        recipe().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("options", [{"experts": 0}, {"seed": -1}])
def test_numbers_outside_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        recipe(**options)
