"""Timing in pairs: one call of each close together, in an order that alternates."""

from __future__ import annotations

import itertools
import time

import pytest

from moediff_plugins.clock import paired_ratios, seconds


def test_seconds_are_those_of_the_call() -> None:
    assert 0.01 <= seconds(lambda: time.sleep(0.01)) < 1


def test_pairs_alternate_in_order_and_the_first_calls_do_not_count() -> None:
    called: list[str] = []
    ratios = paired_ratios(lambda: called.append("ours"), lambda: called.append("base"))
    assert all(ratio > 0 for ratio in itertools.islice(ratios, 3))
    assert called[:2] == ["ours", "base"]
    assert called[2:] == ["ours", "base", "base", "ours", "ours", "base"]


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_ratio_is_ours_over_the_base_in_either_order(pairs: int) -> None:
    ratios = paired_ratios(lambda: time.sleep(0.04), lambda: time.sleep(0.004))
    assert list(itertools.islice(ratios, pairs))[-1] > 1.5
