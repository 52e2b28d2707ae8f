"""Pruners: the papers' orders of removal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

import moediff
from moediff_plugins.counters.params import Params
from moediff_plugins.gates.one_hot import OneHot
from moediff_plugins.pruners.mid_layer import MidLayer
from moediff_plugins.pruners.structural import Structural

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


@pytest.mark.parametrize("name", ["ldm-bedroom", "ldm-church"])
def test_mid_layer_at_the_papers_sizes_on_meta(name):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    with torch.device("meta"):
        unet = UNet2DModel.from_config(config)
    subject = moediff.installed().dissect(unet, DDPMScheduler())
    scores = moediff.Scores(torch.zeros(len(subject.anatomy.units)))
    intervals = moediff.Intervals.uniform(1000, 2)
    experts = subject.split(intervals)
    spaces = [MidLayer().space(expert, scores) for expert in experts]
    budget = moediff.Budget(0.3, Params())
    plan = OneHot().allocate(experts, spaces, intervals, budget, None, moediff.Run())
    share = plan.cost(Params().price(subject), moediff.Sampling())["live"]
    assert 0.15 < share / Params().price(subject).full <= 0.3
    widest = max(unet.config.block_out_channels)
    dropped = [subject.anatomy.layer(layer).channels for layer in plan.blueprints[0].drop]
    assert dropped.count(widest) == sum(
        layer.channels == widest for layer in subject.anatomy.layers if layer.droppable
    )
