"""Budgets bound to prices: floors are named, what fits is filled and no more."""

from __future__ import annotations

import pytest
import torch

from moediff import Allowance, Budget, Step
from moediff.errors import BudgetError
from moediff.testing.tiny import Elements, tiny_space, tiny_subject

SUBJECT = tiny_subject("conditional")
PRICES = Elements().price(SUBJECT)
UNITS = len(SUBJECT.anatomy.units)


def once(part: str) -> tuple[int, ...]:
    return (0, 0)


def apart(part: str) -> tuple[int, ...]:
    return (0, 1)


def allowance(value: float, of: str = "live", copies=once) -> Allowance:  # type: ignore[no-untyped-def]
    return Allowance(Budget(value, Elements(), of), PRICES, (3, 1), copies)  # type: ignore[arg-type]


def test_a_budget_under_the_floor_is_refused_with_the_floor() -> None:
    spaces = [tiny_space(SUBJECT), tiny_space(SUBJECT, flip=True)]
    smallest = torch.stack([space.smallest() for space in spaces])
    floor = float(PRICES.total(smallest, (3, 1))) / PRICES.full
    allowance(floor * 1.001).check_floor(spaces)
    with pytest.raises(BudgetError, match=rf"the floor that this pruner can reach is {floor:.4f}"):
        allowance(floor * 0.999).check_floor(spaces)
    stored = float(PRICES.stored(smallest, apart)) / PRICES.full
    with pytest.raises(BudgetError, match=rf"\(stored\).* is {stored:.4f}"):
        allowance(stored * 0.999, "stored", apart).check_floor(spaces)


def test_fill_opens_the_best_that_fit_and_never_more() -> None:
    name, span = next(iter(SUBJECT.anatomy.spans.items()))
    masks = torch.ones(2, UNITS, dtype=torch.float64)
    masks[:, span] = 0
    masks[:, span.stop - 1] = 1
    units = range(span.start, span.stop - 1)
    steps = [
        Step(((0, unit), (1, unit)), ((0, unit + 1), (1, unit + 1))) for unit in reversed(units)
    ]
    room = float(PRICES.units[span.start]) * 1.5  # one more unit, in both experts
    share = (float(PRICES.total(masks, (3, 1))) + room) / PRICES.full
    filled = allowance(share).fill(masks, steps)
    opened = (filled - masks).nonzero().tolist()
    assert opened == [[0, span.stop - 2], [1, span.stop - 2]], name
    assert allowance(share).fits(filled)
    # behind a closed unit nothing opens, so that chains stay nested
    assert torch.equal(allowance(share).fill(masks, steps[1:]), masks)
    assert torch.equal(allowance(1.0).fill(masks, steps), torch.ones_like(masks))
