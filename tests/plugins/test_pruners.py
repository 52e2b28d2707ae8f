"""Pruners: the papers' orders of removal."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

import moediff
from moediff.anatomy import Anatomy, Layer
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.params import Params
from moediff_plugins.gates.one_hot import OneHot
from moediff_plugins.pruners.mid_layer import MidLayer
from moediff_plugins.pruners.structural import Structural
from moediff_plugins.scorers.random import Random
from tests.conftest import tiny_task

CONFIGS = Path(__file__).parent.parent / "data" / "configs"


def named(space, chain):
    return [space.anatomy.units[unit].name for unit in chain.units]


def test_mid_layer_ranks_by_channels_then_score_then_network_order(subject):
    values = torch.zeros(len(subject.anatomy.units))
    units = subject.anatomy.layer_units
    values[units["mid_block.resnets.0"]] = -1.0
    space = MidLayer().space(subject, moediff.Scores(values))
    order = named(space, space.chains[0])
    channels = [subject.anatomy.layer(name).channels for name in order]
    assert channels == sorted(channels, reverse=True)
    assert order[0] == "mid_block.resnets.0"
    network = [layer.name for layer in subject.anatomy.layers]
    rest = [name for name in order[1:] if subject.anatomy.layer(name).channels == 16]
    assert rest == sorted(rest, key=network.index)


def test_structural_ranks_depth_by_stage_then_branch(subject):
    space = Structural().space(subject, moediff.Scores(torch.ones(len(subject.anatomy.units))))
    assert space.chains[-1].name == "layers"
    assert named(space, space.chains[-1]) == [
        "down_blocks.1.resnets.1",
        "up_blocks.0.resnets.2",
        "down_blocks.0.resnets.1",
        "up_blocks.1.resnets.2",
    ]


def test_structural_removes_the_lowest_scores_of_each_width_first(subject):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(len(subject.anatomy.units), generator=generator)
    space = Structural().space(subject, moediff.Scores(values))
    for chain in space.chains[:-1]:
        assert (values[list(chain.units)].diff() >= 0).all()
    covered = [unit for chain in space.chains for unit in chain.units]
    assert len(covered) == len(set(covered))


def test_mid_layer_asks_for_nothing_but_channels_scores_and_order():
    """Layers of a model that no anatomy knows, under names that no diffusers model has."""
    channels = {"enter": 4, "left": 16, "deep": 32, "deeper": 32, "right": 16, "leave": 32}
    layers = [Layer(name, 0, "mid", c, (name,), ()) for name, c in channels.items()]
    layers.append(Layer("resample", 0, "up", 64, ("resample",), (), droppable=False))
    anatomy = Anatomy(tuple(layers))
    subject = moediff.Subject(torch.nn.Linear(1, 1), DDPMScheduler(), anatomy, (0, 1000))
    scores = moediff.Scores(torch.tensor([0.0, 0.2, 0.3, 0.1, 0.2, 0.3]))
    space = MidLayer().space(subject, scores)
    order = ["deeper", "deep", "leave", "left", "right", "enter"]
    assert [chain.name for chain in space.chains] == ["layers"]
    assert named(space, space.chains[0]) == order


@functools.cache
def full_size(name: str) -> moediff.Subject:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    with torch.device("meta"):
        unet = UNet2DModel.from_config(config)
    return moediff.installed().dissect(unet, DDPMScheduler())


def by_hand(unet: UNet2DModel, score: Mapping[str, float]) -> list[str]:
    """The order of removal, read off the model: most channels, lowest score, first in line."""
    line = [
        f"{path}.resnets.{index}"
        for path in (
            *(f"down_blocks.{k}" for k in range(len(unet.down_blocks))),
            "mid_block",
            *(f"up_blocks.{k}" for k in range(len(unet.up_blocks))),
        )
        for index in range(len(unet.get_submodule(path).resnets))
    ]
    wide = {name: unet.get_submodule(name).conv2.out_channels for name in line}
    removed: list[str] = []
    while len(removed) < len(line):
        left = [name for name in line if name not in removed]
        most = max(wide[name] for name in left)
        left = [name for name in left if wide[name] == most]
        least = min(score[name] for name in left)
        removed.append(next(name for name in left if score[name] == least))
    return removed


@pytest.mark.parametrize("levels", [1, 3], ids=["all equal", "some equal"])
@pytest.mark.parametrize(
    ("counter", "share"),
    [(Params(), 0.3), (Params(), 0.7), (MACs(), 0.35), (MACs(), 0.7)],
    ids=["params-0.3", "params-0.7", "macs-0.35", "macs-0.7"],
)
@pytest.mark.parametrize("name", ["ldm-bedroom", "ldm-church"])
def test_mid_layer_at_the_papers_sizes_on_meta(name, counter, share, levels):
    """What a loop by hand gives, with every candidate really cut and counted.

    Scores that are equal in part are decided by network order in part.
    """
    subject = full_size(name)
    run = moediff.Run(sampling=moediff.Sampling("ddim", 4))
    values = (Random().score(subject, tiny_task(), run).values * levels).floor()
    score = {layer: float(values[unit]) for layer, unit in subject.anatomy.layer_units.items()}
    order = by_hand(subject.denoiser, score)
    full = counter.count(subject.denoiser).value

    def cost(dropped: int) -> float:
        blueprint = moediff.Blueprint(tuple(order[:dropped]))
        return counter.count(moediff.cut(subject.denoiser, subject.anatomy, blueprint)).value

    intervals = moediff.Intervals.uniform(1000, 2)
    experts = subject.split(intervals)
    spaces = [MidLayer().space(expert, moediff.Scores(values)) for expert in experts]
    budget = moediff.Budget(share, counter)
    plan = OneHot().allocate(experts, spaces, intervals, budget, tiny_task(), run)
    dropped = len(plan.blueprints[0].drop)
    assert set(plan.blueprints[0].drop) == set(order[:dropped])
    assert plan.blueprints[0] == plan.blueprints[1]
    # Met, and within one layer: with the last one back it would not be.
    assert cost(dropped) <= share * full < cost(dropped - 1)
    priced = plan.cost(counter.price(subject), run.sampling)["live"]
    assert priced == pytest.approx(cost(dropped), rel=1e-9)
