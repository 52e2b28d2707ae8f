"""Plans are plain data: JSON there and back, differences in words, clear refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moediff import (
    Anatomy,
    Blueprint,
    Intervals,
    Layer,
    Plan,
    Sampling,
    Subject,
    Width,
)
from moediff.errors import OptionError, PlanError, UnknownNameError
from moediff.plan import REST
from moediff.testing.tiny import Elements

A = Anatomy(
    (
        Layer("a", 0, "down", 8, ("a",), (Width("a.g", "groups", 4, 2, "a", 1, ()),)),
        Layer("b", 0, "mid", 8, ("b",), (Width("b.h", "heads", 2, 4, "b", 1, ()),)),
        Layer("c", 0, "up", 8, ("c",), (Width("c.g", "groups", 3, 2, "c", 1, ()),), False),
    )
)


@st.composite
def blueprints(draw: st.DrawFn) -> Blueprint:
    drop = draw(st.sets(st.sampled_from(["a", "b"])))
    keep = {
        name: draw(st.sets(st.integers(0, width.count - 1), min_size=1))
        for name, width in A.widths.items()
        if draw(st.booleans())
    }
    return Blueprint(tuple(drop), keep)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    inner = sorted(draw(st.sets(st.integers(1, 999), max_size=4)))
    intervals = Intervals((0, *inner, 1000))

    def numbers() -> tuple[int, ...]:
        row = [0]
        for _ in inner:
            row.append(row[-1] + draw(st.integers(0, 1)))
        return tuple(row)

    names = draw(st.sets(st.sampled_from([REST, "a", "b", "c"])))
    kept = [draw(blueprints()) for _ in range(len(intervals))]
    return Plan(intervals, kept, {name: numbers() for name in names})


@given(plans())
def test_json_there_and_back(plan: Plan) -> None:
    text = json.dumps(plan.to_json())
    assert Plan.from_json(text) == plan
    assert Plan.from_json(json.loads(text)) == plan
    assert hash(Plan.from_json(text)) == hash(plan)
    assert plan.diff(Plan.from_json(text)) == ()


@given(plans(), plans())
def test_plans_differ_exactly_if_the_difference_has_words(first: Plan, second: Plan) -> None:
    assert bool(first.diff(second)) == (first != second)


@given(blueprints())
def test_masks_there_and_back(blueprint: Blueprint) -> None:
    mask = blueprint.mask(A)
    again = Blueprint.from_mask(A, mask)
    for layer in A.layers:
        if layer.name not in blueprint.drop:
            for width in layer.widths:
                span = A.spans[width.name]
                assert torch.equal(again.mask(A)[span], mask[span])
    assert again.drop == blueprint.drop
    assert Blueprint.from_mask(A, again.mask(A)) == again


def test_diff_says_what_changed() -> None:
    first = Plan(Intervals((0, 5, 10)), [Blueprint(("a",)), Blueprint((), {"b.h": (0,)})])
    second = Plan(Intervals((0, 6, 10)), [Blueprint(("b",)), Blueprint()], {REST: (0, 1)})
    assert first.diff(second) == (
        "intervals: (0, 5, 10) -> (0, 6, 10)",
        "expert 0: a: dropped -> kept",
        "expert 0: b: kept -> dropped",
        "expert 1: b.h: (0,) -> all",
        "copies: *: None -> (0, 1)",
    )


@pytest.mark.parametrize(
    "numbers", [(1, 1), (0,), (0, 2), (0, 1, 1), (0, -1), ()], ids=lambda n: str(n)
)
def test_copies_that_skip_or_fall_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="numbers that start at 0 and rise by 0 or 1"):
        Plan(Intervals((0, 5, 10)), [Blueprint()] * 2, {"a": numbers})


def test_one_blueprint_per_interval() -> None:
    with pytest.raises(PlanError, match="blueprints: got 1; allowed is 2"):
        Plan(Intervals((0, 5, 10)), [Blueprint()])


@pytest.mark.parametrize(
    ("blueprint", "message"),
    [
        (Blueprint(("aa",)), "Did you mean 'a'"),
        (Blueprint(("c",)), "not a layer that can be dropped"),
        (Blueprint((), {"a.h": (0,)}), "keep: got 'a.h'.* Allowed: a.g, b.h, c.g"),
        (Blueprint((), {"a.g": ()}), "To keep none, drop the layer"),
        (Blueprint((), {"a.g": (0, 4)}), "positions from 0 to 3"),
        (Blueprint((), {"a.g": (-1,)}), "positions from 0 to 3"),
        (Blueprint((), {"a.g": (1, 1)}), "distinct"),
    ],
)
def test_blueprints_that_do_not_fit_are_refused(blueprint: Blueprint, message: str) -> None:
    with pytest.raises((PlanError, UnknownNameError), match=message):
        Plan(Intervals((0, 10)), [blueprint]).check(A)


def test_a_mask_that_empties_a_width_is_refused() -> None:
    mask = torch.ones(len(A.units))
    mask[A.spans["b.h"]] = 0
    with pytest.raises(PlanError, match="To keep none, drop the layer"):
        Blueprint.from_mask(A, mask)


def test_a_copies_table_of_unknown_layers_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="layer: got 'z'"):
        Plan(Intervals((0, 10)), [Blueprint()], {"z": (0,)}).check(A)


def test_sharing_experts_must_agree_per_layer() -> None:
    pair = [Blueprint((), {"a.g": (0,)}), Blueprint()]
    with pytest.raises(PlanError, match=r"a: experts that share copy 0 keep different units"):
        Plan(Intervals((0, 5, 10)), pair).check(A)
    Plan(Intervals((0, 5, 10)), pair, {"a": (0, 1)}).check(A)
    dropped = [Blueprint(("a",)), Blueprint(("a",), {"a.g": (0,)})]
    Plan(Intervals((0, 5, 10)), dropped).check(A)  # what a dropped layer keeps does not matter


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        '{"cuts": [0, 10]}',
        '{"cuts": [0, 10], "blueprints": [{}], "copies": {}}',
        '{"cuts": [0, 10], "blueprints": [{"drop": [], "keep": {}, "x": 1}], "copies": {}}',
        '{"cuts": [0, 10], "blueprints": [], "copies": {}}',
        '{"cuts": [0, 10], "blueprints": [{"drop": [], "keep": {}}], "copies": {}, "x": 1}',
    ],
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_other_cuts_in_json_are_refused() -> None:
    plan: dict[str, Any] = {"cuts": [5, 10], "blueprints": [{"drop": [], "keep": {}}], "copies": {}}
    with pytest.raises(OptionError, match="strictly increasing"):
        Plan.from_json(plan)


def test_cost_weights_experts_by_their_calls(subject: Subject) -> None:
    prices = Elements().price(subject)
    name, width = next(iter(subject.anatomy.widths.items()))
    small = Blueprint((), {name: (0,)})
    layer = name.removesuffix(".groups")
    plan = Plan(Intervals((0, 200, 1000)), [small, Blueprint()], {layer: (0, 1)})
    sampling = Sampling("ddim", steps=10)  # 2 calls under 200, 8 above
    saved = float(prices.units[subject.anatomy.spans[name]][0]) * (width.count - 1)
    cost = plan.cost(prices, sampling)
    assert cost["live"] == pytest.approx(prices.full - saved * 0.2)
    index = subject.anatomy.layer_index[layer]
    whole = float(prices.layers(Blueprint().mask(subject.anatomy))[index])
    assert cost["stored"] == pytest.approx(prices.full + whole - saved)


def test_a_width_that_is_named_whole_is_one_that_is_not_named(subject: Subject) -> None:
    width = next(iter(subject.anatomy.widths.values()))
    named = Blueprint((), {width.name: range(width.count)})
    Plan(Intervals((0, 500, 1000)), [named, Blueprint()]).check(subject.anatomy)
