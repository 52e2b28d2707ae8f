"""Gates: budgets are met, floors are refused, the formulas are the papers'."""

from __future__ import annotations

import attrs
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import moediff
from moediff.errors import BudgetError, OptionError
from moediff.plan import REST
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.params import Params
from moediff_plugins.gates.binarise import binarise
from moediff_plugins.gates.era import ERA, _agent, _draw
from moediff_plugins.gates.one_hot import OneHot
from moediff_plugins.pruners.mid_layer import MidLayer
from moediff_plugins.pruners.structural import Structural
from moediff_plugins.scorers.magnitude import Magnitude
from tests.conftest import tiny_task, tiny_unet

N = 2
INTERVALS = moediff.Intervals.uniform(1000, N)


def spaces_of(subject, pruner, run=None):
    scores = Magnitude().score(subject, tiny_task(), run or moediff.Run())
    return [pruner.space(expert, scores) for expert in subject.split(INTERVALS)]


def allocate(subject, gate, pruner, budget):
    run = moediff.Run(sampling=moediff.Sampling("ddim", 10))
    spaces = spaces_of(subject, pruner, run)
    experts = subject.split(INTERVALS)
    return gate.allocate(experts, spaces, INTERVALS, budget, tiny_task(), run)


def share_of(plan, subject, budget):
    prices = budget.counter.price(subject)
    return plan.cost(prices, moediff.Sampling("ddim", 10))[budget.of] / prices.full


@pytest.fixture
def wide(scheduler: DDPMScheduler) -> moediff.Subject:
    """Enough units for a budget to be met finely."""
    unet = tiny_unet(block_out_channels=(32, 64), norm_num_groups=16, attention_head_dim=8)
    return moediff.installed().dissect(unet, scheduler)


@pytest.mark.parametrize("counter", [Params(), MACs()], ids=["params", "macs"])
@pytest.mark.parametrize("value", [0.7, 0.5, 0.3])
@pytest.mark.parametrize("gate", [OneHot(), ERA(steps=2, batch=2)], ids=["one-hot", "era"])
def test_structural_lands_within_one_percent_and_never_above(wide, gate, value, counter):
    budget = moediff.Budget(value, counter)
    share = share_of(allocate(wide, gate, Structural(), budget), wide, budget)
    assert value * 0.99 <= share <= value


@pytest.mark.parametrize("value", [0.7, 0.5, 0.3])
@pytest.mark.parametrize("counter", [Params(), MACs()], ids=["params", "macs"])
def test_mid_layer_is_never_above_and_within_one_layer(subject, value, counter):
    budget = moediff.Budget(value, counter)
    plan = allocate(subject, OneHot(), MidLayer(), budget)
    share = share_of(plan, subject, budget)
    assert share <= value
    chain = spaces_of(subject, MidLayer())[0].chains[0].units
    dropped = len(plan.blueprints[0].drop)
    names = [subject.anatomy.units[unit].layer for unit in chain]
    assert set(plan.blueprints[0].drop) == set(names[:dropped])
    one_fewer = moediff.Blueprint(tuple(names[: dropped - 1]))
    bigger = attrs.evolve(plan, blueprints=(one_fewer,) * N)
    assert share_of(bigger, subject, budget) > value


def test_stored_budget_counts_the_copies(subject):
    live, stored = (moediff.Budget(0.8, Params(), of=of) for of in ("live", "stored"))
    plans = [allocate(subject, OneHot(), MidLayer(), budget) for budget in (live, stored)]
    assert share_of(plans[1], subject, stored) <= 0.8
    assert len(plans[1].blueprints[0].drop) > len(plans[0].blueprints[0].drop)


@pytest.mark.parametrize("gate", [OneHot(), ERA(steps=1, batch=2)], ids=["one-hot", "era"])
def test_a_budget_under_the_floor_is_refused_and_the_floor_is_named(subject, gate):
    budget = moediff.Budget(0.01, MACs())
    space = spaces_of(subject, Structural())[0]
    prices = MACs().price(subject)
    floor = float(prices.experts(space.smallest())) / prices.full
    with pytest.raises(BudgetError, match=f"{floor:.4f}"):
        allocate(subject, gate, Structural(), budget)


def test_budget_one_removes_nothing(subject):
    plan = allocate(subject, OneHot(copies=1), Structural(), moediff.Budget(1.0, MACs()))
    assert plan.blueprints == (moediff.Blueprint(), moediff.Blueprint())


def test_one_hot_copies_every_layer_and_shares_the_rest(subject):
    plan = allocate(subject, OneHot(), MidLayer(), moediff.Budget(0.6, Params()))
    assert plan.copy_numbers(REST) == (0, 0)
    assert {plan.copy_numbers(layer.name) for layer in subject.anatomy.layers} == {(0, 1)}
    assert plan.blueprints[0] == plan.blueprints[1]


def test_one_hot_expands_unevenly_by_table(subject):
    gate = OneHot(copies=1, uneven={"down_blocks.0.*": 2})
    plan = allocate(subject, gate, MidLayer(), moediff.Budget(0.6, Params()))
    assert plan.copy_numbers("down_blocks.0.resnets.0") == (0, 1)
    assert plan.copy_numbers("up_blocks.1.resnets.0") == (0, 0)


def test_one_hot_refuses_copies_that_do_not_divide_the_intervals(subject):
    with pytest.raises(OptionError, match="got 3"):
        allocate(subject, OneHot(copies=3), MidLayer(), moediff.Budget(0.6, Params()))


def test_one_hot_keeps_experts_separate_that_a_tuner_made_so(subject):
    run = moediff.Run(sampling=moediff.Sampling("ddim", 10))
    experts = subject.split(INTERVALS)
    experts = (experts[0], attrs.evolve(experts[1], denoiser=tiny_unet(seed=1)))
    spaces = [Structural().space(e, Magnitude().score(e, tiny_task(), run)) for e in experts]
    budget = moediff.Budget(0.6, Params())
    plan = OneHot().allocate(experts, spaces, INTERVALS, budget, tiny_task(), run)
    assert plan.copies == {REST: (0, 1)}


def test_one_hot_removes_by_score_per_price(subject):
    """With equal scores, the units that save most go first."""
    scores = moediff.Scores(torch.ones(len(subject.anatomy.units)))
    spaces = [Structural().space(e, scores) for e in subject.split(INTERVALS)]
    run = moediff.Run(sampling=moediff.Sampling("ddim", 10))
    budget = moediff.Budget(0.9, MACs())
    experts = subject.split(INTERVALS)
    plan = OneHot().allocate(experts, spaces, INTERVALS, budget, tiny_task(), run)
    prices = MACs().price(subject)
    closed = plan.masks(subject.anatomy)[0] == 0
    layers = [i for i in subject.anatomy.layer_units.values() if closed[i]]
    depth = spaces[0].chains[-1].units
    saved = prices.full - float(prices.experts(1.0 - torch.eye(len(closed))[depth[0]].double()))
    dearest_unit = float(prices.units.max())
    assert saved > dearest_unit
    assert depth[0] in layers


def test_era_probabilities_fall_along_the_order_of_importance(subject):
    spaces = spaces_of(subject, Structural())
    agent = _agent(spaces, 32, moediff.Run())
    p = agent().sigmoid()
    for expert, space in enumerate(spaces):
        for chain in space.chains:
            kept = p[expert, list(chain.units)]
            assert (kept.diff() >= -1e-6).all()  # removal order: the first is the least likely
            assert kept[-1] > 0.999  # the sum over all of a softmax
            assert torch.isfinite(kept.logit()).all()


def test_era_is_about_half_a_million_parameters_at_the_papers_size():
    from diffusers import UNet2DModel

    with torch.device("meta"):
        bedroom = UNet2DModel(
            sample_size=64,
            block_out_channels=(224, 448, 672, 896),
            attention_head_dim=32,
            down_block_types=("DownBlock2D", *("AttnDownBlock2D",) * 3),
            up_block_types=(*("AttnUpBlock2D",) * 3, "UpBlock2D"),
        )
    subject = moediff.installed().dissect(bedroom, DDPMScheduler())
    scores = moediff.Scores(torch.rand(len(subject.anatomy.units)))
    agent = _agent([Structural().space(subject, scores)] * 2, 256, moediff.Run())
    count = sum(parameter.numel() for parameter in agent.parameters())
    assert 0.4e6 < count < 0.65e6


def test_logistic_noise_keeps_half_at_zero_and_gumbel_does_not():
    generator = torch.Generator().manual_seed(0)
    kept = (_draw(torch.Size([200_000]), "logistic", generator) > 0).float().mean()
    assert abs(float(kept) - 0.5) < 0.005
    kept = (_draw(torch.Size([200_000]), "gumbel", generator) > 0).float().mean()
    assert abs(float(kept) - 0.632) < 0.005


def test_era_learns_which_units_matter(subject):
    """Depth layers that carry the output survive against a rank that is the same for all."""
    run = moediff.Run(sampling=moediff.Sampling("ddim", 10))
    budget = moediff.Budget(0.6, MACs())
    gate = ERA(steps=60, batch=4, hidden=32, learning_rate=1e-2)
    experts, spaces = subject.split(INTERVALS), spaces_of(subject, Structural())
    gate.allocate(experts, spaces, INTERVALS, budget, tiny_task(), run)
    penalty = run.records["free/penalty"]
    assert len(penalty) == 60
    assert torch.isfinite(penalty).all()
    assert penalty[-15:].mean() < penalty[:15].mean() + 0.02
    assert run.records["free/cost"][-15:].mean() == pytest.approx(0.6, abs=0.12)
    assert abs(float(run.records["free/gap"])) < 0.5


def test_era_leaves_the_experts_as_they_were_and_repeats_itself(subject):
    before = {name: value.clone() for name, value in subject.denoiser.state_dict().items()}
    budget = moediff.Budget(0.5, MACs())
    gate = ERA(steps=3, batch=2, hidden=16)
    state = torch.get_rng_state()
    plan = allocate(subject, gate, Structural(), budget)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert allocate(subject, gate, Structural(), budget) == plan
    for name, value in subject.denoiser.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None and p.requires_grad for p in subject.denoiser.parameters())


@given(seed=st.integers(0, 2**16), value=st.floats(0.3, 1.0))
@settings(max_examples=15, deadline=None)
def test_binarise_keeps_chains_nested_and_meets_any_budget(seed, value):
    subject = moediff.installed().dissect(tiny_unet(), DDPMScheduler())
    spaces = spaces_of(subject, Structural())
    budget = moediff.Budget(value, Params())
    allowance = moediff.Allowance(budget, Params().price(subject), (6, 4), lambda part: (0, 1))
    generator = torch.Generator().manual_seed(seed)
    p = torch.ones(N, len(subject.anatomy.units), dtype=torch.float64)
    for expert, space in enumerate(spaces):
        for chain in space.chains:
            rising = torch.rand(len(chain.units), generator=generator).double().sort().values
            p[expert, list(chain.units)] = rising
    masks = binarise(p, spaces, allowance)
    assert allowance.fits(masks)
    for expert, space in enumerate(spaces):
        for chain in space.chains:
            kept = masks[expert, list(chain.units)]
            assert kept[-1] == 1
            assert (kept.diff() >= 0).all()
