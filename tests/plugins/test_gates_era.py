"""The gates that learn masks, past the paper: N experts, strides, resumed logs, other starts."""

from __future__ import annotations

import attrs
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import moediff
from moediff.sampling import generate, initial_noise
from moediff.space import Chain
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.params import Params
from moediff_plugins.gates.binarise import binarise
from moediff_plugins.gates.era import ERA, _agent, _start_at
from moediff_plugins.gates.independent import Independent
from moediff_plugins.gates.one_hot import OneHot
from moediff_plugins.gates.soft import _together, allowance_of, descent, frozen
from moediff_plugins.pruners.structural import Structural
from moediff_plugins.scorers.magnitude import Magnitude
from tests.conftest import tiny_task, tiny_unet

N = 2
INTERVALS = moediff.Intervals.uniform(1000, N)
SAMPLING = moediff.Sampling("ddim", 10)
QUICK = ERA(steps=2, batch=2, hidden=16)
GATES = [QUICK, Independent(steps=2, batch=2)]


@pytest.fixture(scope="module")
def wide() -> moediff.Subject:
    """Enough units for a budget to be met finely, and two widths of groups: 2 and 4 channels."""
    unet = tiny_unet(block_out_channels=(32, 64), norm_num_groups=16, attention_head_dim=8)
    return moediff.installed().dissect(unet, DDPMScheduler())


def allocate(subject, gate, budget, *, intervals=INTERVALS, run=None, pruner=None, task=None):
    run, task = run or moediff.Run(sampling=SAMPLING), task or tiny_task()
    scores = Magnitude().score(subject, task, run)
    experts = subject.split(intervals)
    spaces = [(pruner or Structural()).space(expert, scores) for expert in experts]
    plan = gate.allocate(experts, spaces, intervals, budget, task, run)
    return plan, spaces, run


@pytest.mark.parametrize("gate", GATES, ids=["era", "independent"])
@pytest.mark.parametrize("counter", [Params(), MACs()], ids=["params", "macs"])
def test_four_experts_meet_the_budget_of_any_counter(wide, gate, counter):
    intervals = moediff.Intervals((0, 100, 350, 700, 1000))
    budget = moediff.Budget(0.5, counter)
    plan, _, run = allocate(wide, gate, budget, intervals=intervals)
    prices = counter.price(wide)
    share = plan.cost(prices, SAMPLING)["live"] / prices.full
    assert 0.495 <= share <= 0.5
    assert len(plan.blueprints) == 4
    assert plan.copy_numbers("mid_block.resnets.0") == (0, 1, 2, 3)
    assert run.records["free/probabilities"].shape == (4, len(wide.anatomy.units))


@pytest.mark.parametrize("gate", GATES, ids=["era", "independent"])
def test_the_budget_is_met_by_the_calls_that_guided_heun_really_makes(gate):
    """Counted while images are made: Eq. 14's interval lengths would be far off here."""
    unet = tiny_unet(
        "class-conditional", block_out_channels=(32, 64), norm_num_groups=16, num_class_embeds=5
    )
    subject = moediff.installed().dissect(unet, DDPMScheduler())
    sampling = moediff.Sampling("heun", 10, guidance=2.0)
    intervals, budget = moediff.Intervals((0, 150, 1000)), moediff.Budget(0.5, MACs())
    run = moediff.Run(sampling=sampling)
    plan, _, _ = allocate(
        subject, gate, budget, intervals=intervals, run=run, task=tiny_task(labelled=True)
    )
    mixture = moediff.ExpertMixture.from_experts(subject.split(intervals), plan)
    calls = [0, 0]
    for index, expert in enumerate(mixture.experts):

        def count(module: object, args: object, index: int = index) -> None:
            calls[index] += 1

        expert.register_forward_pre_hook(count)
    label, null = {"class_labels": torch.tensor([1])}, {"class_labels": torch.tensor([4])}
    with torch.no_grad():
        noise = initial_noise([0], subject.shape)
        generate(mixture, subject.scheduler, sampling, noise, label, null, [0])
    assert sum(calls) == 2 * 19  # Heun calls twice but in the last step, guidance doubles it
    costs = [MACs().count(expert).value for expert in mixture.experts]
    spent = sum(c * n for c, n in zip(costs, calls, strict=True)) / sum(calls)
    assert 0.495 <= spent / MACs().count(unet).value <= 0.5


@given(length=st.integers(1, 40), stride=st.integers(1, 12))
@settings(deadline=None)
def test_a_chain_goes_in_steps_of_its_stride_and_the_first_is_what_is_left_over(length, stride):
    chain = Chain("c", tuple(range(length)), stride)
    assert [unit for units in chain.steps for unit in units] == list(range(length))
    sizes = [len(units) for units in chain.steps]
    assert all(size == stride for size in sizes[1:])
    assert 1 <= sizes[0] <= stride
    assert Chain("c", tuple(range(length))).steps == tuple((unit,) for unit in range(length))


@pytest.mark.parametrize("gate", [*GATES, OneHot()], ids=["era", "independent", "one-hot"])
@pytest.mark.parametrize("value", [0.7, 0.5])
def test_rounded_widths_are_multiples_and_the_counter_sees_them(wide, gate, value):
    """In groups of 2 and 4 channels, and heads of 8, which fit already."""
    budget = moediff.Budget(value, MACs())
    plan, _, _ = allocate(wide, gate, budget, pruner=Structural(round_to=16))
    cuts = 0
    for blueprint in plan.blueprints:
        small = moediff.cut(wide.denoiser, wide.anatomy, blueprint)
        for name, width in wide.anatomy.widths.items():
            layer = next(u.layer for u in wide.anatomy.units if u.width == name)
            if layer not in blueprint.drop:
                kept = len(blueprint.keep.get(name, range(width.count))) * width.size
                assert kept % 16 == 0 or kept == width.count * width.size
                cuts += kept < width.count * width.size
        priced = float(MACs().price(wide).experts(blueprint.mask(wide.anatomy)))
        assert priced == pytest.approx(MACs().count(small).value)
    assert cuts > 3
    prices = MACs().price(wide)
    assert plan.cost(prices, SAMPLING)["live"] / prices.full <= value


def test_units_that_go_together_have_one_probability_and_one_noise(wide):
    scores = moediff.Scores(torch.rand(len(wide.anatomy.units)))
    spaces = [Structural(round_to=8).space(expert, scores) for expert in wide.split(INTERVALS)]
    agent = _agent(spaces, 16, moediff.Run())
    together = _together(spaces[0])
    v = agent()
    assert torch.equal(v, v[:, together])
    chained = {unit for chain in spaces[0].chains for unit in chain.units}
    steps = sum(len(chain.steps) for chain in spaces[0].chains)
    alone = len(wide.anatomy.units) - len(chained)
    assert len(set(together.tolist())) == steps + alone < len(wide.anatomy.units)
    strides = {chain.name: chain.stride for chain in spaces[0].chains}
    assert strides["down_blocks.0.resnets.0.groups"] == 4
    assert strides["down_blocks.1.resnets.0.groups"] == 2
    assert strides["down_blocks.1.attentions.0.heads"] == strides["layers"] == 1


@given(seed=st.integers(0, 2**16), value=st.floats(0.45, 1.0), ordered=st.booleans())
@settings(max_examples=15, deadline=None)
def test_binarise_opens_whole_steps_and_keeps_the_end_of_every_chain(
    wide_space, seed, value, ordered
):
    subject, space = wide_space
    allowance = moediff.Allowance(
        moediff.Budget(value, Params()), Params().price(subject), (6, 4), lambda part: (0, 1)
    )
    generator = torch.Generator().manual_seed(seed)
    p = torch.ones(N, len(subject.anatomy.units), dtype=torch.float64)
    for expert in range(N):
        for chain in space.chains:
            drawn = torch.rand(len(chain.steps), generator=generator).double()
            drawn = drawn.sort().values if ordered else drawn
            for units, value_ in zip(chain.steps, drawn, strict=True):
                p[expert, list(units)] = value_
    masks = binarise(p, [space] * N, allowance, ordered=ordered)
    assert allowance.fits(masks)
    for row in masks:
        for chain in space.chains:
            kept = [row[list(units)].unique().tolist() for units in chain.steps]
            assert all(len(values) == 1 for values in kept)
            assert kept[-1] == [1.0]
            assert not ordered or kept == sorted(kept)


@pytest.fixture(scope="module")
def wide_space() -> tuple[moediff.Subject, moediff.SearchSpace]:
    subject = moediff.installed().dissect(
        tiny_unet(block_out_channels=(16, 32), norm_num_groups=8), DDPMScheduler()
    )
    scores = moediff.Scores(torch.rand(len(subject.anatomy.units)))
    return subject, Structural(round_to=12).space(subject, scores)


@pytest.mark.parametrize("value", [0.7, 0.5, 0.35])
def test_a_start_at_the_budget_costs_the_budget(wide, value):
    run = moediff.Run(sampling=SAMPLING)
    experts = wide.split(INTERVALS)
    scores = Magnitude().score(wide, tiny_task(), run)
    spaces = [Structural().space(expert, scores) for expert in experts]
    allowance = allowance_of(experts, spaces, INTERVALS, moediff.Budget(value, MACs()), run)
    agent = _agent(spaces, 32, run)

    def cost() -> float:
        with torch.no_grad():
            return float(allowance.cost(agent().sigmoid().double()) / allowance.limit)

    even = cost() * value
    _start_at(agent, allowance)
    assert cost() == pytest.approx(1.0, abs=0.01)
    assert even == pytest.approx(0.55, abs=0.07)  # wherever the budget is
    p = agent().sigmoid()[0]
    for chain in spaces[0].chains:
        assert (p[list(chain.units)].diff() >= -1e-6).all()


def test_r_is_weighted_in_the_loss_and_not_in_the_record(wide):
    budget, runs = moediff.Budget(0.3, MACs()), []
    for penalty in (1.0, 5.0):
        gate = attrs.evolve(QUICK, steps=1, penalty=penalty)
        runs.append(allocate(wide, gate, budget)[2].records)
    first, second = runs
    assert torch.equal(first["free/penalty"], second["free/penalty"])
    more = second["free/loss-era"] - first["free/loss-era"]
    assert more == pytest.approx(4 * first["free/penalty"], rel=1e-4)
    wanted = (first["free/cost"] / 0.3).log().abs()
    assert first["free/penalty"] == pytest.approx(wanted, rel=1e-5)


class Leaf(torch.nn.Module):
    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(values)

    def forward(self) -> torch.Tensor:
        return self.values


def test_the_denoising_loss_reaches_the_masks_with_its_own_slope(wide):
    """Eq. 15 without R, whose rounding has no slope: gradients against finite differences."""
    run, task = moediff.Run(sampling=SAMPLING), tiny_task()
    experts = wide.split(INTERVALS)
    spaces = [Structural().space(e, Magnitude().score(wide, task, run)) for e in experts]
    allowance = allowance_of(experts, spaces, INTERVALS, moediff.Budget(0.5, MACs()), run)
    leaf = Leaf(torch.randn(N, len(wide.anatomy.units), generator=torch.Generator().manual_seed(2)))
    gate = Independent(batch=4, penalty=1e-9)
    descend = descent(gate, leaf, experts, spaces, allowance, task, torch.zeros(2, 1))

    def loss() -> float:
        return float(descend(0, torch.Generator().manual_seed(3)))

    with frozen(experts):
        loss()
        slope = leaf.values.grad.clone()
        assert (slope.abs().sum(1) > 0).all()  # of every expert
        ends, steepest = [], slope / slope.norm()
        for sign in (1, -1):
            leaf.values.data += sign * 0.02 * steepest
            ends.append(loss())
            leaf.values.data -= sign * 0.02 * steepest
    assert float(slope.norm()) == pytest.approx((ends[0] - ends[1]) / 0.04, rel=0.02)


@pytest.mark.parametrize("gate", GATES, ids=["era", "independent"])
def test_a_resumed_gate_has_the_whole_log(wide, gate, tmp_path, monkeypatch):
    gate = attrs.evolve(gate, steps=5, save_every=2)
    budget, task = moediff.Budget(0.5, MACs()), tiny_task()

    def work(folder):
        run = moediff.Run(sampling=SAMPLING, cache=tmp_path / folder)
        plan = run.stage(
            "plan",
            ["x"],
            lambda: allocate(wide, gate, budget, run=run, task=task)[0],
            pack=lambda plan: ({}, plan.to_json()),
            unpack=lambda tensors, data: moediff.Plan.from_json(data),
        )
        return plan, run.records

    wanted = work("whole")
    calls, whole = [0], type(task).batch

    def batch(*args):
        calls[0] += 1
        if calls[0] == 2 * 3 + 2:  # in the fourth step, after the checkpoint of the second
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(type(task), "batch", batch)
    with pytest.raises(KeyboardInterrupt):
        work("killed")
    monkeypatch.undo()
    found = work("killed")
    assert found[0] == wanted[0]
    assert set(found[1]) == set(wanted[1])
    for name, tensor in wanted[1].items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(found[1][name], tensor), name


def test_independent_masks_keep_what_the_scores_call_useless_if_it_is_needed(wide):
    """Two units of one chain swap their scores; which of them stays is learned all the same."""
    budget = moediff.Budget(0.5, MACs())
    plan, spaces, run = allocate(wide, Independent(steps=20, batch=2, learning_rate=0.1), budget)
    p = run.records["free/probabilities"][0]
    mask = plan.masks(wide.anatomy)[0]
    falls = [
        chain.name
        for chain in spaces[0].chains
        if (p[list(chain.units)].diff() < 0).any() and (mask[list(chain.units)].diff() < 0).any()
    ]
    assert falls
    for chain in spaces[0].chains:
        assert mask[chain.units[-1]] == 1


def test_independent_masks_start_at_one_half(wide):
    _, _, run = allocate(
        wide, Independent(steps=1, batch=1, learning_rate=1e-6), moediff.Budget(0.5, MACs())
    )
    p = run.records["free/probabilities"]
    assert ((p - 0.5).abs() < 1e-5).logical_or(p > 0.999).all()
    assert ((p - 0.5).abs() < 1e-5).float().mean() > 0.8
