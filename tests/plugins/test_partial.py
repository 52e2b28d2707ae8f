"""Tuners that train a part of the parameters: which ones move, and that no other does."""

from __future__ import annotations

import copy
from typing import Any

import attrs
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

import moediff
from moediff.errors import OptionError
from moediff.workdir import Run
from moediff_plugins.tuners.bitfit import BitFit
from moediff_plugins.tuners.partial import Partial, _layers
from tests.conftest import tiny_task, tiny_unet
from tests.plugins.tuning import FAST, TINY, build, colours, equal, weights


@pytest.fixture
def task() -> moediff.Task:
    return colours()


def moved(mixture: moediff.ExpertMixture, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, value in mixture.state_dict().items() if not torch.equal(value, before[n])}


def loss_of(mixture: moediff.ExpertMixture, scheduler: Any, task: moediff.Task) -> float:
    generator = torch.Generator().manual_seed(7)
    batch, times = task.batch(256, generator), torch.randint(0, 1000, (256,), generator=generator)
    with torch.no_grad():
        return float(moediff.denoising_loss(mixture, scheduler, batch, times, generator))


# ------------------------------------------------------------------------------------------- bitfit


def test_bitfit_moves_every_bias_and_nothing_else(subject: moediff.Subject, task: moediff.Task):
    mixture, run = build(subject).untie(), Run()
    before = weights(mixture)
    BitFit(steps=4, weight_decay=0.1, **TINY).recover(mixture, task, subject, run)
    biases = {name for name in before if name.endswith(".bias")}
    assert moved(mixture, before) == biases
    assert {"experts.0.conv_norm_out.bias", "experts.1.conv_out.bias"} <= biases
    sizes = [(n, p.numel()) for n, p in mixture.named_parameters()]  # each parameter once
    trained = sum(size for name, size in sizes if name in biases)
    share = run.records["free/trained-share"].item()
    assert share == pytest.approx(trained / sum(size for _, size in sizes))
    assert 0 < share < 0.1


def test_bitfit_lowers_the_loss(subject: moediff.Subject, task: moediff.Task):
    mixture = build(subject)
    before = loss_of(mixture, subject.scheduler, task)
    BitFit(steps=60, **{**FAST, "learning_rate": 0.02}).recover(mixture, task, subject, Run())
    assert loss_of(mixture, subject.scheduler, task) < 0.9 * before


def test_bitfit_refuses_a_base_whose_biases_are_frozen(
    subject: moediff.Subject, task: moediff.Task
):
    frozen = copy.deepcopy(subject.denoiser)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(not name.endswith(".bias"))
    mixture = build(attrs.evolve(subject, denoiser=frozen))
    with pytest.raises(OptionError, match="no biases that may be trained"):
        BitFit(steps=2, **TINY).recover(mixture, task, subject, Run())


# ------------------------------------------------------------------------------------------ partial

ORDER = [
    ("conv_out",),
    ("conv_norm_out",),
    ("up_blocks.1.resnets.1",),
    ("up_blocks.1.resnets.0",),
    ("up_blocks.0.upsamplers.0.conv",),
    ("up_blocks.0.resnets.1", "up_blocks.0.attentions.1"),
    ("up_blocks.0.resnets.0", "up_blocks.0.attentions.0"),
    ("mid_block.resnets.1",),
    ("mid_block.resnets.0", "mid_block.attentions.0"),
    ("down_blocks.1.resnets.0", "down_blocks.1.attentions.0"),
    ("down_blocks.0.downsamplers.0.conv",),
    ("down_blocks.0.resnets.0",),
    ("conv_in",),
    ("class_embedding",),
    ("time_embedding.linear_2",),
    ("time_embedding.linear_1",),
]
"""The layers of the tiny class-conditional UNet, the last one first."""


def test_layers_come_from_the_output_end_backwards(scheduler: Any):
    base = moediff.installed().dissect(tiny_unet("class-conditional"), scheduler)
    base.denoiser.train()
    before = weights(base.denoiser)
    found = _layers(base, tiny_task(labelled=True))
    assert found == ORDER
    names = {name for name, _ in base.denoiser.named_parameters()}
    covered = {n for n in names if any(n.startswith(f"{p}.") for paths in found for p in paths)}
    assert covered == names
    assert base.denoiser.training
    assert equal(weights(base.denoiser), before)
    assert not any(module._forward_hooks for module in base.denoiser.modules())


def test_no_hook_survives_a_failing_call(subject: moediff.Subject, task: moediff.Task):
    wrong = attrs.evolve(task, conditioning={"no_such_keyword": torch.zeros(32)})
    with pytest.raises(TypeError, match="no_such_keyword"):
        _layers(subject, wrong)
    assert not any(module._forward_hooks for module in subject.denoiser.modules())


@pytest.mark.parametrize("count", [1, 2])
def test_partial_moves_its_layers_and_nothing_else(scheduler: Any, count: int):
    base = moediff.installed().dissect(tiny_unet("class-conditional"), scheduler)
    task, run = tiny_task(labelled=True), Run()
    mixture = build(base, count).untie()
    sizes = {id(p): p.numel() for p in mixture.parameters()}
    inside = tuple(f"{path}." for paths in ORDER[:4] for path in paths)
    wanted = {
        n
        for n, _ in mixture.named_parameters(remove_duplicate=False)
        if n.split(".", 2)[2].startswith(inside)
    }
    chosen = {id(mixture.get_parameter(name)) for name in wanted}
    share = sum(sizes[key] for key in chosen) / sum(sizes.values())
    before = weights(mixture)
    tuner = Partial(share=share, steps=2 * count, weight_decay=0.1, **TINY)  # exactly these fit
    tuner.recover(mixture, task, base, run)
    assert moved(mixture, before) == wanted
    assert run.records["free/trained-share"].item() == pytest.approx(share)
    assert not any(p.grad is not None or not p.requires_grad for p in mixture.parameters())


SUBJECT = moediff.installed().dissect(tiny_unet(), DDPMScheduler(num_train_timesteps=1000))
LAYERS = _layers(SUBJECT, colours())
MIXTURE = build(SUBJECT).untie()


@given(share=st.floats(0.01, 1.0))
def test_the_share_is_never_exceeded_and_the_next_layer_would(share: float):
    sizes = {name: (id(p), p.numel()) for name, p in MIXTURE.named_parameters()}
    total = sum(size for _, size in sizes.values())
    chosen = {id(p) for p in Partial(share=share)._last(MIXTURE, LAYERS)}
    parts = []
    for paths in LAYERS:
        inside = tuple(f"{path}." for path in paths)
        part = dict(v for name, v in sizes.items() if name.split(".", 2)[2].startswith(inside))
        parts += [part] if part else []  # layers that were dropped have none
    count = sum(set(part) <= chosen for part in parts)
    taken = [sum(part.values()) for part in parts]
    assert chosen == set().union(*parts[:count])  # a run of layers from the output end
    assert 0 < sum(taken[:count]) <= share * total
    assert count == len(parts) or sum(taken[: count + 1]) > share * total


def test_a_share_under_the_last_layer_is_refused(subject: moediff.Subject, task: moediff.Task):
    with pytest.raises(OptionError, match=r"conv_out, is 0\.0\d+ of the parameters"):
        Partial(share=1e-4, steps=2, **TINY).recover(build(subject), task, subject, Run())


def test_what_the_base_froze_counts_and_stays(subject: moediff.Subject, task: moediff.Task):
    subject.denoiser.conv_out.requires_grad_(False)
    mixture = build(subject).untie()
    before = weights(mixture)
    Partial(share=0.2, steps=4, **TINY).recover(mixture, task, subject, Run())
    names = moved(mixture, before)
    assert "experts.0.conv_norm_out.weight" in names
    assert not any("conv_out." in name for name in names)


def test_partial_at_one_is_finetune(subject: moediff.Subject, task: moediff.Task):
    mixture = build(subject).untie()
    before = weights(mixture)
    Partial(share=1.0, steps=4, **TINY).recover(mixture, task, subject, Run())
    assert moved(mixture, before) == set(before)
