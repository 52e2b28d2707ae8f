"""Prices that add up, in masks soft and hard, and the shares that a budget may be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moediff
from moediff import Blueprint, Budget, CostModel, Intervals, Subject, cut
from moediff.errors import BudgetError
from moediff.plan import REST
from moediff.testing.tiny import Elements, tiny_subject

SUBJECT = tiny_subject("conditional")
PRICES = Elements().price(SUBJECT)
UNITS = len(SUBJECT.anatomy.units)
MASKS = st.lists(st.floats(0, 1), min_size=UNITS, max_size=UNITS).map(
    lambda row: torch.tensor(row, dtype=torch.float64)
)


def once(part: str) -> tuple[int, ...]:
    return (0, 0)


def apart(part: str) -> tuple[int, ...]:
    return (0, 1)


def test_full_price_is_the_count() -> None:
    assert PRICES.full == Elements().count(SUBJECT.denoiser).value


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=UNITS, max_size=UNITS))
def test_hard_masks_cost_what_the_cut_model_counts(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.float64)
    for span in SUBJECT.anatomy.spans.values():
        mask[span.start] = 1
    smaller = cut(SUBJECT.denoiser, SUBJECT.anatomy, Blueprint.from_mask(SUBJECT.anatomy, mask))
    assert float(PRICES.experts(mask)) == pytest.approx(Elements().count(smaller).value, rel=1e-9)


@given(MASKS, MASKS, st.tuples(st.integers(1, 9), st.integers(0, 9)))
def test_live_cost_is_the_mean_over_calls(
    first: torch.Tensor, second: torch.Tensor, calls: tuple[int, int]
) -> None:
    masks = torch.stack([first, second])
    each = PRICES.experts(masks)
    wanted = (each[0] * calls[0] + each[1] * calls[1]) / sum(calls)
    assert float(PRICES.total(masks, calls)) == pytest.approx(float(wanted))


@given(MASKS)
def test_shared_experts_are_stored_once_and_separate_ones_twice(mask: torch.Tensor) -> None:
    masks = torch.stack([mask, mask])
    one = float(PRICES.experts(mask))
    assert float(PRICES.stored(masks, once)) == pytest.approx(one)
    assert float(PRICES.stored(masks, apart)) == pytest.approx(2 * one)


def test_only_the_layers_that_differ_are_stored_twice() -> None:
    name = SUBJECT.anatomy.layers[0].name
    masks = torch.ones(2, UNITS, dtype=torch.float64)
    stored = PRICES.stored(masks, lambda part: (0, 1) if part == name else (0, 0))
    assert float(stored) == pytest.approx(PRICES.full + float(PRICES.layers(masks)[0, 0]))
    rest = PRICES.stored(masks, lambda part: (0, 1) if part == REST else (0, 0))
    assert float(rest) == pytest.approx(PRICES.full + PRICES.outside)


def test_price_gradients_are_finite_and_reach_every_mask() -> None:
    masks = torch.full((2, UNITS), 0.7, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(PRICES.total(masks, (1, 1)), masks)
    assert torch.isfinite(gradient).all()
    assert bool((gradient != 0).all())


def test_a_layers_gradient_is_what_dropping_it_saves() -> None:
    """Eq. 12 is linear in a layer's own mask."""
    index = next(iter(SUBJECT.anatomy.layer_units.values()))
    masks = torch.ones(1, UNITS, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(PRICES.total(masks, (1,)), masks)
    dropped = masks.detach().clone()
    dropped[0, index] = 0
    saved = PRICES.full - float(PRICES.total(dropped, (1,)))
    assert float(gradient[0, index]) == pytest.approx(saved)


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_budgets_outside_are_refused(value: float) -> None:
    with pytest.raises(BudgetError, match=f"budget: got {float(value)}; allowed is a share"):
        Budget(value, Elements())


@pytest.mark.parametrize("value", [1, 1.0, 0.001])
def test_budgets_inside_are_taken(value: float) -> None:
    assert Budget(value, Elements()).value == float(value)


def test_budgets_are_live_or_stored() -> None:
    with pytest.raises(ValueError, match="live"):
        Budget(0.5, Elements(), "dead")  # type: ignore[arg-type]


def test_calls_come_from_the_sampling() -> None:
    intervals = Intervals((0, 50, 100))
    calls = moediff.Sampling("ddim", steps=4).calls(SUBJECT.scheduler, intervals)
    masks = torch.ones(2, UNITS, dtype=torch.float64)
    assert float(PRICES.total(masks, calls)) == pytest.approx(PRICES.full)


def test_prices_are_for_the_whole_model(subject: Subject) -> None:
    prices: CostModel = Elements().price(subject)
    layers = prices.layers(torch.ones(len(subject.anatomy.units), dtype=torch.float64))
    assert float(layers.sum()) + prices.outside == pytest.approx(prices.full)
    assert prices.unit == "elements"
