"""Anatomies: numbering of units, and the five UNets' anatomies against the real modules."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

import moediff
from moediff import Anatomy, Layer, Unit, Width
from moediff.errors import AnatomyError, UnknownNameError
from moediff.testing import check_anatomy
from tests.conftest import UNETS, tiny_unet

PLAIN = Width("a.groups", "groups", 2, 4, "a.conv2", 1, ())
HEADS = Width("a.heads", "heads", 3, 4, "a.out", -1, ())
HAND_MADE = Anatomy(
    (
        Layer("a", 0, "down", 8, ("a",), (PLAIN, HEADS)),
        Layer(
            "b", 0, "down", 8, ("b",), (Width("b.g", "groups", 2, 4, "b", 1, ()),), droppable=False
        ),
        Layer("c", 0, "up", 8, ("c",), ()),
    )
)


def test_units_are_numbered_layer_first_then_its_widths() -> None:
    assert HAND_MADE.units == (
        Unit("a"),
        Unit("a", "a.groups", 0),
        Unit("a", "a.groups", 1),
        *(Unit("a", "a.heads", k) for k in range(3)),
        Unit("b", "b.g", 0),
        Unit("b", "b.g", 1),
        Unit("c"),
    )
    assert HAND_MADE.spans == {
        "a.groups": slice(1, 3),
        "a.heads": slice(3, 6),
        "b.g": slice(6, 8),
    }
    assert HAND_MADE.layer_units == {"a": 0, "c": 8}
    assert HAND_MADE.layer_index == {"a": 0, "b": 1, "c": 2}


def test_unit_names_say_where_they_are() -> None:
    assert [unit.name for unit in HAND_MADE.units[:3]] == ["a", "a.groups[0]", "a.groups[1]"]


def test_layers_are_found_by_name() -> None:
    assert HAND_MADE.layer("b").droppable is False
    with pytest.raises(UnknownNameError, match="Allowed: a, b, c"):
        HAND_MADE.layer("z")


def test_the_conformance_check_passes() -> None:
    # mask = cut for the units of all five UNets is in test_masking.py
    provider = moediff.installed().create("anatomies", "unet2d", {})
    check_anatomy(provider, tiny_unet("class-conditional"))


def test_every_resblock_is_a_layer(any_subject: moediff.Subject) -> None:
    blocks = {
        name
        for name, module in any_subject.denoiser.named_modules()
        if type(module).__name__ == "ResnetBlock2D"
    }
    assert {layer.name for layer in any_subject.anatomy.layers} == blocks
    inside = {path for layer in any_subject.anatomy.layers for path in layer.modules}
    attentions = {
        name
        for name, module in any_subject.denoiser.named_modules()
        if type(module).__name__ == "Attention"
    }
    assert inside == blocks | attentions


def test_resampling_blocks_have_widths_and_stay() -> None:
    layers = [*_anatomy("resampling-blocks").layers, *_anatomy("scale-shift").layers]
    resampling = [layer for layer in layers if "samplers" in layer.name]
    assert {layer.branch for layer in resampling} == {"down", "up"}
    assert not any(layer.droppable for layer in resampling)
    assert all(layer.widths for layer in resampling)


def test_all_three_kinds_of_bypass_occur() -> None:
    kinds = {layer.bypass for kind in UNETS for layer in _anatomy(kind).layers}
    assert kinds == {"identity", "shortcut", "previous"}


def _anatomy(kind: str) -> Anatomy:
    provider = moediff.installed().create("anatomies", "unet2d", {})
    anatomy: Anatomy = provider.dissect(tiny_unet(kind))
    return anatomy


def test_a_block_without_a_rule_is_named() -> None:
    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "UpBlock2D"),
    )
    provider = moediff.installed().create("anatomies", "unet2d", {})
    with pytest.raises(AnatomyError, match=r"down_blocks\.1: no rule for a SkipDownBlock2D"):
        provider.dissect(net)


def test_an_anatomy_is_read_from_meta_alike() -> None:
    with torch.device("meta"):
        empty: nn.Module = UNet2DModel.from_config(tiny_unet().config)
    provider = moediff.installed().create("anatomies", "unet2d", {})
    assert provider.dissect(empty) == _anatomy("plain")
