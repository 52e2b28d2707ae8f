"""Invariant 3: route on t alone, and agree with the training sampler for every real scheduler."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moediff import Intervals, Sampling
from moediff.errors import DataError, OptionError
from moediff.sampling import SCHEDULERS
from tests.conftest import base_scheduler

CUTS = st.lists(st.integers(1, 999), max_size=7, unique=True).map(
    lambda inner: Intervals((0, *sorted(inner), 1000))
)


def owner(intervals: Intervals, timestep: float) -> int:
    """The interval by its definition: low <= t < high; T belongs to the last."""
    held = [k for k, (low, high) in enumerate(intervals) if low <= timestep < high]
    return held[0] if held else len(intervals) - 1


@given(CUTS, st.integers(0, 1000))
def test_every_kind_of_timestep_is_routed_alike(intervals: Intervals, timestep: int) -> None:
    wanted = owner(intervals, timestep)
    forms = [
        timestep,
        float(timestep),
        torch.tensor(timestep),
        torch.tensor(float(timestep), dtype=torch.float32),
        torch.tensor(float(timestep), dtype=torch.float64),
    ]
    assert [intervals.route(form) for form in forms] == [wanted] * len(forms)
    rows = intervals.route(torch.tensor([timestep, 0, 999]))
    assert rows.tolist() == [wanted, 0, len(intervals) - 1]
    assert rows.dtype == torch.long


@given(CUTS, st.floats(0, 1000))
def test_fractional_timesteps_belong_to_the_interval_around_them(
    intervals: Intervals, timestep: float
) -> None:
    wanted = owner(intervals, timestep)
    assert intervals.route(timestep) == wanted
    assert intervals.route(torch.tensor([timestep], dtype=torch.float64)).tolist() == [wanted]


@pytest.mark.parametrize("steps", [1, 4, 10, 33, 50])
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_router_and_training_sampler_agree_for_every_scheduler(name: str, steps: int) -> None:
    if name == "pndm" and steps == 1:
        steps = 5  # PNDM starts with four Runge-Kutta steps
    intervals = Intervals((0, 137, 500, 501, 902, 1000))
    scheduler = Sampling(name, steps=steps).prepare(base_scheduler(name))
    generator = torch.Generator().manual_seed(0)
    trained = [
        set(intervals.sample(20_000, generator, expert).tolist())
        for expert in range(len(intervals))
    ]
    assert len(scheduler.timesteps) >= steps
    for timestep in scheduler.timesteps:
        index = intervals.route(timestep)
        assert index == owner(intervals, float(timestep))
        assert intervals.route(float(timestep)) == index
        assert intervals.route(timestep.repeat(3)).tolist() == [index] * 3
        # the expert was trained around this timestep
        assert {int(timestep), min(int(timestep), 999)} & trained[index]


def test_flow_match_starts_at_the_total_and_is_clamped() -> None:
    first = Sampling("flow-match", 10).prepare(base_scheduler("flow-match")).timesteps[0]
    assert first.item() == 1000.0
    assert Intervals((0, 500, 1000)).route(first) == 1


def test_bfloat16_would_cross_a_cut() -> None:
    """Why timesteps are routed before any cast: bfloat16 has eight bits, 501 becomes 500."""
    intervals, timestep = Intervals((0, 501, 1000)), torch.tensor(501)
    assert intervals.route(timestep) == 1
    assert intervals.route(timestep.to(torch.bfloat16)) == 0


@pytest.mark.parametrize("wrong", [float("nan"), -1, 1000.5, float("inf")])
def test_timesteps_outside_are_errors(wrong: float) -> None:
    intervals = Intervals((0, 500, 1000))
    for form in (wrong, torch.tensor(wrong), torch.tensor([3.0, wrong])):
        with pytest.raises(DataError, match=r"timestep: got .*allowed is 0 to 1000"):
            intervals.route(form)


@pytest.mark.parametrize("cuts", [(), (0,), (1, 5), (0, 5, 5), (0, 7, 3), (0, 0)])
def test_cut_points_that_do_not_rise_from_zero_are_refused(cuts: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="strictly increasing"):
        Intervals(cuts)


@given(st.integers(1, 300), st.data())
def test_uniform_lengths_differ_by_one_at_most(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    intervals = Intervals.uniform(total, count)
    lengths = {high - low for low, high in intervals}
    assert (len(intervals), intervals.total) == (count, total)
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("count", [0, -1, 11])
def test_more_experts_than_timesteps_is_refused(count: int) -> None:
    with pytest.raises(OptionError, match=f"experts: got {count}; allowed is 1 to 10"):
        Intervals.uniform(10, count)


def test_sample_covers_exactly_its_interval() -> None:
    intervals, generator = Intervals((0, 3, 10)), torch.Generator().manual_seed(0)
    assert set(intervals.sample(500, generator, 0).tolist()) == {0, 1, 2}
    assert set(intervals.sample(500, generator, 1).tolist()) == set(range(3, 10))
    assert set(intervals.sample(500, generator).tolist()) == set(range(10))


def test_indexing_and_iteration_give_the_same_intervals() -> None:
    intervals = Intervals((0, 3, 10))
    assert list(intervals) == [intervals[0], intervals[1]] == [(0, 3), (3, 10)]
    assert intervals[-1] == (3, 10)
    with pytest.raises(IndexError):
        intervals[2]
