"""Scores and chains: what is refused, what compares across layers, what always stays."""

from __future__ import annotations

import pytest
import torch

from moediff import Anatomy, Chain, Layer, Scores, SearchSpace, Subject, Width
from moediff.errors import DataError

A = Anatomy(
    (
        Layer("a", 0, "down", 8, ("a",), (Width("a.g", "groups", 4, 2, "a", 1, ()),)),
        Layer("b", 0, "mid", 8, ("b",), (Width("b.h", "heads", 2, 4, "b", 1, ()),)),
        Layer("c", 0, "up", 8, ("c",), (Width("c.g", "groups", 3, 2, "c", 1, ()),), False),
    )
)


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([1.0, float("nan")]),
        torch.tensor([float("inf")]),
        torch.zeros(()),
        torch.zeros(1, 1, 1),
    ],
)
def test_scores_are_finite_and_flat(values: torch.Tensor) -> None:
    with pytest.raises(DataError, match="finite floats of shape"):
        Scores(values)


def test_scores_of_one_expert() -> None:
    each = Scores(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), comparable=False)
    assert each.expert(1).values.tolist() == [3.0, 4.0]
    assert each.expert(1).comparable is False
    assert Scores(torch.tensor([1.0, 2.0])).expert(7).values.tolist() == [1.0, 2.0]


def test_scores_that_do_not_compare_are_normalised_per_layer() -> None:
    values = torch.arange(1.0, len(A.units) + 1)
    assert torch.equal(Scores(values).across(A), values.double())
    across = Scores(values, comparable=False).across(A)
    for span in A.spans.values():
        assert across[span].sum().item() == pytest.approx(1)
        assert torch.equal(across[span].argsort(), values[span].argsort())
    assert across[A.layer_units["b"]].item() == 1  # the larger of the two layer units
    assert across[A.layer_units["a"]].item() == pytest.approx(1 / 6)
    assert torch.isfinite(Scores(torch.zeros(len(A.units)), comparable=False).across(A)).all()


def test_the_smallest_mask_keeps_the_end_of_every_chain() -> None:
    space = SearchSpace(
        A, (Chain("a.g", (4, 1, 3, 2)), Chain("layers", (0, 5))), Scores(torch.ones(12))
    )
    assert space.removable == 4
    assert space.smallest().tolist() == [0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1]


def test_scores_below_zero_keep_their_order_when_they_are_normalised(subject: Subject) -> None:
    anatomy = subject.anatomy
    values = torch.linspace(-3, -1, len(anatomy.units), dtype=torch.float64)
    made = Scores(values, comparable=False).across(anatomy)
    parts = [list(range(span.start, span.stop)) for span in anatomy.spans.values()]
    for units in (*parts, list(anatomy.layer_units.values())):
        assert torch.equal(made[units].argsort(), values[units].argsort())
    assert made.abs().max() <= 1
