"""Counters: exact, alike, additive, and closed to what they do not know."""

from __future__ import annotations

import time

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moediff
from moediff.errors import CountError
from moediff_plugins.counters.fvcore import FVCore
from moediff_plugins.counters.inputs import example, twin
from moediff_plugins.counters.macs import MACs, tally
from moediff_plugins.counters.params import Params
from tests.conftest import UNETS, tiny_unet

COUNTERS = [Params(), MACs(), FVCore()]
NORMS = {"group_norm", "layer_norm"}


class Wrapped(nn.Module):
    """A denoiser with one operator of the test's choice."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator
        self.config = {"sample_size": 8, "in_channels": 3}
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep, return_dict=True):
        return (self.operator(sample),)


def random_blueprint(anatomy, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(len(anatomy.units), generator=generator) > 0.4).double()
    for span in anatomy.spans.values():
        mask[span.start] = 1
    return moediff.Blueprint.from_mask(anatomy, mask)


@pytest.mark.parametrize("counter", COUNTERS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("kind", sorted(UNETS))
@given(seed=st.integers(0, 2**16))
@settings(max_examples=2, deadline=None)
def test_prices_add_up_to_the_count_of_the_cut_model(kind, counter, seed):
    subject = moediff.installed().dissect(tiny_unet(kind), DDPMScheduler())
    prices = counter.price(subject)
    blueprint = random_blueprint(subject.anatomy, seed)
    counted = counter.count(moediff.cut(subject.denoiser, subject.anatomy, blueprint)).value
    assert float(prices.experts(blueprint.mask(subject.anatomy))) == pytest.approx(
        counted, rel=1e-9
    )
    assert prices.full == pytest.approx(counter.count(subject.denoiser).value, rel=1e-9)


@pytest.mark.parametrize("kind", sorted(UNETS))
def test_fvcore_without_its_norms_is_macs(kind):
    unet = tiny_unet(kind)
    theirs = FVCore().count(unet)
    without = sum(v for name, v in theirs.by_operator.items() if name not in NORMS)
    assert without < theirs.value
    assert without == MACs().count(unet).value


@pytest.mark.parametrize("kind", sorted(UNETS))
def test_meta_and_cpu_tensors_count_alike(kind):
    unet = tiny_unet(kind)
    on_cpu = tally(twin(unet, "cpu"), example(unet, None, "cpu"))
    assert on_cpu.value == MACs().count(unet).value
    on_meta = MACs().count(unet.to("meta"))
    assert on_cpu.by_module == on_meta.by_module


def test_params_counts_a_shared_tensor_once():
    unet = tiny_unet()
    assert Params().count(unet).value == sum(p.numel() for p in unet.parameters())
    unet.mid_block.resnets[1] = unet.mid_block.resnets[0]
    assert Params().count(unet).value == sum(p.numel() for p in unet.parameters())


def test_one_convolution_and_one_attention_by_hand():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    assert MACs().count(Wrapped(conv)).value == 8 * 8 * 5 * 3 * 9

    def attend(x):
        tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)  # (1, 1, 64, 3)
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    assert MACs().count(Wrapped(attend)).value == 2 * 64 * 64 * 3


def test_an_operator_without_a_rule_is_an_error_that_names_it():
    wrapped = Wrapped(lambda x: torch.linalg.svdvals(x))
    with pytest.raises(CountError, match="svd"):
        MACs().count(wrapped)
    assert not wrapped._forward_hooks
    assert not wrapped._forward_pre_hooks
    with pytest.raises(CountError, match="svd"):
        FVCore().count(wrapped)


def test_count_allocates_nothing_and_leaves_the_model_alone():
    unet = tiny_unet("class-conditional").train()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    for counter in COUNTERS:
        counter.count(unet)
    assert unet.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in unet.modules())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    copy = twin(unet, "meta")
    assert all(p.device.type == "meta" for p in copy.parameters())


def test_gradients_reach_soft_masks(subject):
    masks = torch.full(
        (2, len(subject.anatomy.units)), 0.5, dtype=torch.float64, requires_grad=True
    )
    MACs().price(subject).total(masks, (3, 1)).backward()
    assert (masks.grad[0] > 0).all()
    assert torch.allclose(masks.grad[0], 3 * masks.grad[1])


def test_a_conditional_unet_counts_one_token_of_context():
    """cin256-v2 of the LDM paper: 400.92 M parameters, 104.23 G MACs with one context token."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=3,
            out_channels=3,
            block_out_channels=(192, 384, 576, 960),
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            cross_attention_dim=512,
            attention_head_dim=(6, 12, 18, 30),
        )
    started = time.perf_counter()
    assert Params().count(unet).value == pytest.approx(400.92e6, rel=0.005)
    assert MACs().count(unet).value == pytest.approx(104.23e9, rel=0.005)
    assert time.perf_counter() - started < 60
