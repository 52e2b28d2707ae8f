"""Gates: budgets are met, floors are refused, the formulas are the papers'."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import moediff
from moediff.anatomy import Anatomy, Layer
from moediff.errors import BudgetError, NoEffectWarning, OptionError
from moediff.plan import REST
from moediff.testing import tiny
from moediff.testing.promises import failing, repeated, settled, untouched
from moediff.workdir import Checkpoint
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.params import Params
from moediff_plugins.gates.binarise import binarise
from moediff_plugins.gates.era import ERA, _agent
from moediff_plugins.gates.independent import Independent
from moediff_plugins.gates.learned_expansion import LearnedExpansion
from moediff_plugins.gates.one_hot import OneHot
from moediff_plugins.gates.soft import draw
from moediff_plugins.pruners.mid_layer import MidLayer
from moediff_plugins.pruners.structural import Structural
from moediff_plugins.scorers.magnitude import Magnitude
from tests.conftest import UNETS, tiny_task, tiny_unet

N = 2
INTERVALS = moediff.Intervals.uniform(1000, N)


def spaces_of(subject, pruner, run=None, intervals=INTERVALS):
    scores = Magnitude().score(subject, tiny_task(), run or moediff.Run())
    return [pruner.space(expert, scores) for expert in subject.split(intervals)]


def allocate(subject, gate, pruner, budget, intervals=INTERVALS):
    run = moediff.Run(sampling=moediff.Sampling("ddim", 10))
    spaces = spaces_of(subject, pruner, run, intervals)
    experts = subject.split(intervals)
    return gate.allocate(experts, spaces, intervals, budget, tiny_task(), run)


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


def distinct(mixture):
    return sum({id(p): p.numel() for p in mixture.parameters()}.values())


EXPANSIONS: dict[str, tuple[int, OneHot]] = {
    "none": (2, OneHot(copies=1)),
    "uniform 2x": (2, OneHot()),
    "uniform 4x": (4, OneHot()),
    "uneven": (4, OneHot(copies=1, uneven={"down_blocks.0.*": 4, "up_blocks.*": 2})),
    "outer": (2, OneHot(outer=3)),
    "3 beside 2": (6, OneHot(copies=2, uneven={"up_blocks.1.*": 3})),
}


@pytest.mark.parametrize("kind", ["plain", "resampling-blocks"])
@pytest.mark.parametrize("name", EXPANSIONS)
def test_memory_and_artefact_grow_only_by_what_is_duplicated(name, kind, scheduler, tmp_path):
    count, gate = EXPANSIONS[name]
    subject = moediff.installed().dissect(tiny_unet(kind), scheduler)
    intervals = moediff.Intervals.uniform(1000, count)
    plan = allocate(subject, gate, MidLayer(), moediff.Budget(0.6, Params()), intervals)
    dropped, prices, sampling = plan.blueprints[0].drop, Params().price(subject), moediff.Sampling()
    assert dropped
    one = plan.cost(prices, sampling)["live"]
    # By hand: what one expert has, and every further copy of a layer that has one.
    small = moediff.cut(subject.denoiser, subject.anatomy, plan.blueprints[0])
    sizes = {
        layer.name: sum(
            p.numel() for path in layer.modules for p in small.get_submodule(path).parameters()
        )
        for layer in subject.anatomy.layers
    }
    more = sum((max(plan.copy_numbers(layer)) * size for layer, size in sizes.items()), start=0)
    stored = plan.cost(prices, sampling)["stored"]
    assert stored == one + more
    assert (more == 0) == (name == "none")

    mixture = moediff.ExpertMixture.from_experts(subject.split(intervals), plan)
    for tied, wanted in ((True, one), (False, stored)):
        if not tied:
            mixture.untie()
        assert distinct(mixture) == wanted
        mixture.save_pretrained(tmp_path / str(tied))
        saved = safetensors.torch.load_file(tmp_path / str(tied) / "mixture.safetensors")
        assert sum(tensor.numel() for tensor in saved.values()) == wanted


def test_three_copies_stand_beside_two_on_six_intervals(subject):
    count, gate = EXPANSIONS["3 beside 2"]
    intervals = moediff.Intervals.uniform(1000, count)
    plan = allocate(subject, gate, MidLayer(), moediff.Budget(0.6, Params()), intervals)
    assert plan.copy_numbers("up_blocks.1.resnets.0") == (0, 0, 1, 1, 2, 2)
    assert plan.copy_numbers("down_blocks.0.resnets.0") == (0, 0, 0, 1, 1, 1)
    mixture = moediff.ExpertMixture.from_experts(subject.split(intervals), plan).untie()
    up, down = (
        [id(expert.get_submodule(name)) for expert in mixture.experts]
        for name in ("up_blocks.1.resnets.0", "down_blocks.0.resnets.0")
    )
    assert [len(set(ids)) for ids in (up, down)] == [3, 2]
    assert up[0] == up[1] != up[2]


@pytest.mark.parametrize(("outer", "first", "last"), [(0, 0, 0), (1, 0, 1), (4, 2, 2), (99, 99, 0)])
def test_outer_copies_what_is_nearest_to_the_ends_of_what_remains(subject, outer, first, last):
    plan = allocate(subject, OneHot(outer=outer), MidLayer(), moediff.Budget(0.5, Params()))
    names = [layer.name for layer in subject.anatomy.layers]
    left = [name for name in names if name not in plan.blueprints[0].drop]
    assert 4 < len(left) < len(names)
    wanted = {*left[:first], *left[len(left) - last :]}
    assert {name for name in names if plan.copy_numbers(name) == (0, 1)} == wanted


def test_outer_under_a_stored_budget_counts_the_copies_of_what_remains(subject):
    budget = moediff.Budget(0.6, Params(), of="stored")
    plan = allocate(subject, OneHot(outer=4), MidLayer(), budget)
    share = share_of(plan, subject, budget)
    chain = spaces_of(subject, MidLayer())[0].chains[0].units
    dropped = plan.blueprints[0].drop
    order = [subject.anatomy.units[unit].layer for unit in chain]
    assert set(dropped) == set(order[: len(dropped)])
    # One layer more, with the copies that "outer" would then mean, would not fit.
    left = [n.name for n in subject.anatomy.layers if n.name not in order[: len(dropped) - 1]]
    table = dict.fromkeys(left[:2] + left[-2:], (0, 1))
    blueprint = moediff.Blueprint(tuple(order[: len(dropped) - 1]))
    bigger = attrs.evolve(plan, blueprints=(blueprint,) * N, copies=table)
    assert share <= 0.6 < share_of(bigger, subject, budget)


def test_patterns_go_before_outer(subject):
    gate = OneHot(outer=2, uneven={"down_blocks.0.resnets.0": 1, "mid_block.*": 2})
    plan = allocate(subject, gate, MidLayer(), moediff.Budget(0.9, Params()))
    assert plan.copy_numbers("down_blocks.0.resnets.0") == (0, 0)
    assert plan.copy_numbers("mid_block.resnets.1") == (0, 1)
    assert plan.copy_numbers("up_blocks.1.resnets.2") == (0, 1)


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
    with pytest.warns(NoEffectWarning, match="`outer` have no effect"):
        same = OneHot(outer=2).allocate(experts, spaces, INTERVALS, budget, tiny_task(), run)
    assert same == plan


def test_one_hot_shares_no_layer_that_the_scores_make_different(subject):
    """Scores of each interval leave other units; one copy of a layer cannot be both."""
    units = len(subject.anatomy.units)
    scores = moediff.Scores(torch.rand(N, units, generator=torch.Generator().manual_seed(0)))
    recipe = moediff.load_recipe(
        "moedm", pruner=Structural(), recover=None, budget=moediff.Budget(0.6, MACs())
    )
    net, scheduler, task = subject.denoiser, subject.scheduler, tiny_task()
    given = {"scores": scores}
    mixture = moediff.build_experts(net, scheduler, task, recipe, given=given)
    first, second = mixture.plan.masks(subject.anatomy)
    assert not torch.equal(first, second)
    for gate in (OneHot(copies=1), OneHot(outer=2)):
        with pytest.raises(OptionError, match=r"copies: got 1 for .* in 2 intervals, which keep"):
            moediff.build_experts(
                net, scheduler, task, attrs.evolve(recipe, gate=gate), given=given
            )
    same = {"scores": moediff.Scores(scores.values[0])}
    recipe = attrs.evolve(recipe, gate=OneHot(copies=1))
    alike = moediff.build_experts(net, scheduler, task, recipe, given=same)
    assert alike.plan.blueprints[0] == alike.plan.blueprints[1]


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
    kept = (draw(torch.Size([200_000]), "logistic", generator) > 0).float().mean()
    assert abs(float(kept) - 0.5) < 0.005
    kept = (draw(torch.Size([200_000]), "gumbel", generator) > 0).float().mean()
    assert abs(float(kept) - 0.632) < 0.005


@pytest.mark.parametrize(("kind", "rate"), [(ERA, 3e-2), (Independent, 1e-1)])
@pytest.mark.parametrize("value", [0.45, 0.9])
def test_the_budget_pulls_the_masks_to_it_from_either_side(subject, kind, rate, value):
    """R passes its slope straight through the rounding (Eq. 12-15)."""
    run = moediff.Run(sampling=moediff.Sampling("ddim", 10))
    experts, spaces = subject.split(INTERVALS), spaces_of(subject, Structural())
    gate = kind(steps=80, batch=2, learning_rate=rate, penalty=30.0)
    budget = moediff.Budget(value, MACs())
    gate.allocate(experts, spaces, INTERVALS, budget, tiny_task(), run)
    cost = run.records["free/cost"]
    assert abs(float(cost[0]) - value) > 0.1
    assert cost[-10:].mean() == pytest.approx(value, rel=0.05)
    penalty = (cost.double() / value).log().abs()  # log(max(T, T_d) / min(T, T_d)) (Eq. 14)
    torch.testing.assert_close(run.records["free/penalty"].double(), penalty, rtol=1e-4, atol=1e-5)


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


# ---------------------------------------------------------------------------- learned expansion

STORED = moediff.Budget(0.7, Params(), of="stored")
QUICK = LearnedExpansion(live=0.5, steps=4, batch=2, save_every=1)


def copied(plan):
    return {name for name, numbers in plan.copies.items() if max(numbers)}


@pytest.mark.parametrize("pruner", [MidLayer(), Structural()], ids=["mid-layer", "structural"])
@pytest.mark.parametrize("counter", [Params(), MACs()], ids=["params", "macs"])
@pytest.mark.parametrize("value", [0.55, 0.75, 1.0])
def test_learned_expansion_fills_the_budget_and_never_exceeds_it(wide, pruner, counter, value):
    budget = moediff.Budget(value, counter, of="stored")
    plan = allocate(wide, QUICK, pruner, budget)
    plan.check(wide.anatomy)
    share = share_of(plan, wide, budget)
    assert share <= value
    assert plan.copy_numbers(REST) == (0, 0)
    # The experts are those of one-hot, and no layer without a copy would have fitted.
    alone = allocate(wide, OneHot(copies=1), pruner, moediff.Budget(0.5, counter))
    assert plan.blueprints == alone.blueprints
    for layer in wide.anatomy.layers:
        if layer.name not in copied(plan) | set(plan.blueprints[0].drop):
            more = attrs.evolve(plan, copies={**plan.copies, layer.name: (0, 1)})
            assert share_of(more, wide, budget) > value


@given(
    value=st.floats(0.4, 1.0),
    live=st.floats(0.35, 0.6),
    kind=st.sampled_from(sorted(UNETS)),
    count=st.integers(2, 3),
)
@settings(max_examples=8, deadline=None)
def test_learned_expansion_meets_any_budget_that_it_accepts(value, live, kind, count):
    subject = moediff.installed().dissect(tiny_unet(kind), DDPMScheduler())
    budget = moediff.Budget(value, Params(), of="stored")
    intervals, task = moediff.Intervals.uniform(1000, count), tiny_task(kind == "class-conditional")
    run = moediff.Run(sampling=moediff.Sampling("ddim", 10))
    spaces = spaces_of(subject, MidLayer(), run, intervals)
    gate = LearnedExpansion(live=live, steps=1, batch=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # where there is no room for a copy
        try:
            plan = gate.allocate(subject.split(intervals), spaces, intervals, budget, task, run)
        except BudgetError:
            assert value < live or float(
                Params().price(subject).experts(spaces[0].smallest())
            ) > live * Params().price(subject).full * (1 - 1e-6)
            return
    assert share_of(plan, subject, budget) <= value
    live_share = share_of(plan, subject, moediff.Budget(live, Params()))
    assert live_share <= live


def test_learned_expansion_refuses_a_live_budget(subject):
    with pytest.raises(OptionError, match=r'got of="live"; .* allows of="stored"'):
        allocate(subject, QUICK, MidLayer(), moediff.Budget(0.7, Params()))


def test_learned_expansion_refuses_budgets_without_room_for_one_expert(subject):
    with pytest.raises(BudgetError, match=r"got 0\.4 \(stored\), which is less than live=0\.5"):
        allocate(subject, QUICK, MidLayer(), moediff.Budget(0.4, Params(), of="stored"))
    with pytest.raises(BudgetError, match=r"live=0\.01: .* floor"):
        allocate(subject, attrs.evolve(QUICK, live=0.01), MidLayer(), STORED)
    with pytest.raises(BudgetError, match=r"got 0\.001 .* \(stored\); the floor"):
        allocate(subject, QUICK, MidLayer(), moediff.Budget(0.001, Params(), of="stored"))


def test_learned_expansion_refuses_experts_that_a_tuner_made_separate(subject):
    experts = subject.split(INTERVALS)
    experts = (experts[0], attrs.evolve(experts[1], denoiser=tiny_unet(seed=1)))
    spaces = spaces_of(subject, MidLayer())
    with pytest.raises(OptionError, match="denoisers that differ"):
        QUICK.allocate(experts, spaces, INTERVALS, STORED, tiny_task(), moediff.Run())


def test_layers_in_which_the_experts_differ_already_have_copies_and_pay_for_them(wide):
    """Scores by interval remove other units from each expert: such a layer cannot be shared."""
    experts = wide.split(INTERVALS)
    values = torch.arange(1.0, len(wide.anatomy.units) + 1)
    flipped = values.clone()
    span = wide.anatomy.spans["down_blocks.0.resnets.0.groups"]
    flipped[span] = values[span].flip(0)
    scores = [moediff.Scores(values), moediff.Scores(flipped)]
    spaces = [Structural().space(e, s) for e, s in zip(experts, scores, strict=True)]
    run, budget = moediff.Run(), moediff.Budget(0.8, Params(), of="stored")
    plan = QUICK.allocate(experts, spaces, INTERVALS, budget, tiny_task(), run)
    plan.check(wide.anatomy)
    first, second = (b.keep["down_blocks.0.resnets.0.groups"] for b in plan.blueprints)
    assert first != second
    assert plan.copy_numbers("down_blocks.0.resnets.0") == (0, 1)
    asked = ~run.records["free/gates"].isnan()
    index = wide.anatomy.layer_index
    assert not asked[index["down_blocks.0.resnets.0"]]
    assert (
        asked[index["up_blocks.1.resnets.2"]] or "up_blocks.1.resnets.2" in plan.blueprints[0].drop
    )
    assert share_of(plan, wide, budget) <= 0.8


def test_learned_expansion_keeps_the_kits_promises_where_it_trains():
    """The kit's two experts have opposite scores, so there it finds no layer to ask about."""

    def trained(subject):
        spaces, task, run = [tiny.tiny_space(subject)] * 2, tiny.tiny_task(), tiny.tiny_run()
        intervals = moediff.Intervals(tiny.CUTS)
        with untouched(QUICK, subject, data=[task]):
            plan = QUICK.allocate(subject.split(intervals), spaces, intervals, STORED, task, run)
        assert not run.records["free/gates"].isnan().all()
        return plan, run.records

    with settled():
        repeated(QUICK, lambda: trained(tiny.tiny_subject()), lambda found: found[0].to_json())
        repeated(QUICK, lambda: trained(tiny.tiny_subject()), lambda found: found[1])
        failing(QUICK, tiny.tiny_subject, trained)


def test_learned_expansion_resumes_where_it_was_killed(subject, task, tmp_path, monkeypatch):
    spaces = spaces_of(subject, MidLayer())

    def work(cache):
        run = moediff.Run(cache=cache)
        plan = run.stage(
            "plan",
            [],
            lambda: QUICK.allocate(subject.split(INTERVALS), spaces, INTERVALS, STORED, task, run),
            pack=lambda plan: ({}, plan.to_json()),
            unpack=lambda tensors, data: moediff.Plan.from_json(data),
        )
        return plan, run

    wanted, whole = work(tmp_path / "whole")
    save = Checkpoint.save

    def killed(checkpoint, tensors, data):
        save(checkpoint, tensors, data)
        if len(data["losses"]) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            work(tmp_path / "killed")
    calls = [0]

    def count(*_):
        calls[0] += 1

    handle = subject.denoiser.register_forward_pre_hook(count)
    found, resumed = work(tmp_path / "killed")
    handle.remove()
    assert found == wanted
    assert calls == [2]  # of 4 steps, two were done before
    assert {"plan/gates", "plan/cost", "plan/loss-expansion"} == set(whole.records)
    for name, record in whole.records.items():
        assert torch.equal(resumed.records[name].nan_to_num(-1), record.nan_to_num(-1)), name
    assert resumed.ledger["plan"].samples == whole.ledger["plan"].samples == 4 * 2
    assert not list((tmp_path / "killed").glob("*.checkpoint"))


class Separable(torch.nn.Module):
    """Every channel of the input goes through a layer of its own; `filler` is there to be dropped.

    Its best weights are known: what predicts the clean image from the noisy one is the ratio that
    the noise schedule gives for the spread of the channel's data, and 0 where the data are 0.
    """

    CHANNELS = 4

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.config = SimpleNamespace(sample_size=4, in_channels=self.CHANNELS)
        self.filler = torch.nn.Conv2d(self.CHANNELS, self.CHANNELS, 5, padding=2)
        self.layers = torch.nn.ModuleList(
            torch.nn.Conv2d(1, 1, size, padding=size // 2) for size in sizes
        )
        with torch.no_grad():
            for layer, size in zip(self.layers, sizes, strict=True):
                layer.weight.fill_(0.0)[:, :, size // 2, size // 2] = 0.5
                layer.bias.zero_()

    def forward(self, sample: torch.Tensor, timestep: Any, return_dict: bool = True) -> Any:
        rows = self.filler(sample).split(1, dim=1)
        return (torch.cat([f(row) for f, row in zip(self.layers, rows, strict=True)], dim=1),)


def separable(
    special: Collection[int], sizes: Sequence[int] = (3, 3, 3, 3)
) -> tuple[moediff.Subject, moediff.Task]:
    """Special channels have data of spread 1, the others 0; `sizes` are those of the kernels."""
    denoiser = Separable(sizes).eval()
    names = ["filler", *(f"layers.{index}" for index in range(Separable.CHANNELS))]
    layers = [Layer(name, 0, "mid", 1, (name,), ()) for name in names]
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type="sample")
    scheduler.betas = torch.linspace(1e-4, 0.05, 100)
    scheduler.alphas_cumprod = (1 - scheduler.betas).cumprod(0)
    subject = moediff.Subject(denoiser, scheduler, Anatomy(tuple(layers)), (0, 100))
    images = np.zeros((64, 4, 4, Separable.CHANNELS), dtype=np.float32)
    for channel in special:
        images[..., channel] = np.random.default_rng(channel).choice((-1.0, 1.0), (64, 4, 4))
    samples = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return subject, moediff.Task(samples)


def expand(special, copies, sizes=(3, 3, 3, 3), **options):
    """Drop the filler; the budget has room for so many copies of a 3x3 kernel."""
    subject, task = separable(special, sizes)
    intervals = moediff.Intervals.uniform(100, options.pop("experts", 2))
    filler = moediff.Scores(torch.tensor([-1.0, 1, 1, 1, 1]))
    spaces = [MidLayer().space(expert, filler) for expert in subject.split(intervals)]
    prices = Params().price(subject)
    left = float(prices.fixed[1:].sum()) + 0.5  # half a parameter more, against rounding
    live, stored = left / prices.full, (left + 10 * copies) / prices.full
    budget = moediff.Budget(stored, Params(), of="stored")
    gate = LearnedExpansion(live=live, **options)
    run = moediff.Run()
    plan = gate.allocate(subject.split(intervals), spaces, intervals, budget, task, run)
    assert plan.blueprints[0].drop == ("filler",)
    return plan, run.records["free/gates"][1:]


TRAINED = {"steps": 200, "batch": 16, "learning_rate": 1e-2, "gate_rate": 2e-2}


@pytest.mark.parametrize("special", range(Separable.CHANNELS))
def test_the_gate_copies_the_layer_whose_best_weights_differ_between_the_intervals(special):
    """All layers must change, and far; only one of them differently for early and late steps."""
    plan, gates = expand([special], 1, **TRAINED)
    assert copied(plan) == {f"layers.{special}"}
    others = torch.cat([gates[:special], gates[special + 1 :]])
    assert gates[special] - others.max() > 5 * (others.max() - others.min()), gates


@pytest.mark.parametrize(("copies", "experts"), [(0, 2), (1, 1)])
def test_learned_expansion_says_when_nothing_was_copied(copies, experts):
    with pytest.warns(NoEffectWarning, match="nothing is copied"):
        plan, _ = expand([0], copies, experts=experts, steps=1, batch=1)
    assert not copied(plan)


def test_learned_expansion_breaks_ties_in_network_order():
    """After one step every difference is still 0, so no gate has learned anything."""
    plan, gates = expand([3], 2, steps=1, batch=1, penalty=1e-9)
    assert len(set(gates.tolist())) == 1
    assert copied(plan) == {"layers.0", "layers.1"}


@pytest.mark.parametrize(("cheap", "dear"), [(0, 2), (2, 0)])
def test_price_is_in_the_gates(cheap, dear):
    """Of two layers that are of equal use, the dear one comes second, before those of no use.

    So gates are ranked as they are: by use per price. Divided by the price (10 and 26 parameters)
    once more, the dear layer would come last.
    """
    sizes = [5 if index == dear else 3 for index in range(Separable.CHANNELS)]
    _, gates = expand([cheap, dear], 2.6, sizes, **TRAINED)
    useless = max(gates[index] for index in (1, 3))
    assert gates[cheap] > gates[dear] + 0.02 > useless + 0.04, gates
