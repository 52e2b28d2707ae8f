"""Invariant 5: the subject and the process are left as they were found."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moediff import Intervals, Subject
from moediff.subject import preserved
from tests.conftest import tiny_unet


def state(net: nn.Module) -> dict[str, Any]:
    keys = np.random.get_state()
    return {
        "modes": {name: module.training for name, module in net.named_modules()},
        "flags": {name: p.requires_grad for name, p in net.named_parameters()},
        "grads": {
            n: None if p.grad is None else p.grad.tolist() for n, p in net.named_parameters()
        },
        "torch": torch.get_rng_state().tolist(),
        "numpy": [np.asarray(part).tolist() for part in keys],
        "random": random.getstate(),
    }


def disturb(net: nn.Module) -> None:
    """Everything that a library call may move."""
    torch.rand(5)
    torch.manual_seed(7)
    np.random.rand(5)
    random.random()
    net.train()
    net(torch.zeros(1, 3, 8, 8), 3).sample.square().sum().backward()
    net.requires_grad_(False)


def mixed() -> nn.Module:
    """A model whose modes, flags and gradients are not all alike."""
    net = tiny_unet()
    net.mid_block.train()
    net.conv_in.requires_grad_(False)
    net.conv_out.weight.grad = torch.ones_like(net.conv_out.weight)
    return net


def test_everything_is_restored() -> None:
    net = mixed()
    before = state(net)
    with preserved(net) as inside:
        assert inside is net
        disturb(net)
        assert state(net) != before
    after = state(net)
    assert [key for key in before if before[key] != after[key]] == []


def test_everything_is_restored_after_an_error() -> None:
    net = mixed()
    before = state(net)

    def fail() -> None:
        with preserved(net):
            disturb(net)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert state(net) == before


def test_the_error_comes_through_though_modules_were_added() -> None:
    net = tiny_unet()

    def grow() -> None:
        with preserved(net):
            net.add_module("extra", nn.Linear(2, 2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        grow()


def test_strategies_run_in_eval_mode_without_old_gradients() -> None:
    net = mixed()
    with preserved(net):
        assert not any(module.training for module in net.modules())
        assert all(parameter.grad is None for parameter in net.parameters())
        assert not net.conv_in.weight.requires_grad  # a partly frozen model stays so


def test_a_model_frozen_as_a_whole_has_gradients_inside_only() -> None:
    net = tiny_unet().requires_grad_(False)
    with preserved(net):
        loss = net(torch.ones(1, 3, 8, 8), 3).sample.square().sum()
        (gradient,) = torch.autograd.grad(loss, net.conv_in.weight)
        assert gradient.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_a_subject_knows_its_shape_and_its_schedule(subject: Subject) -> None:
    assert subject.shape == (3, 8, 8)
    assert subject.total == 1000
    assert subject.interval == (0, 1000)
    assert subject.device == torch.device("cpu")


def test_oblong_samples_have_both_sizes(scheduler: Any) -> None:
    net = tiny_unet(sample_size=(8, 16))
    assert Subject(net, scheduler, None, (0, 1000)).shape == (3, 8, 16)  # type: ignore[arg-type]


def test_split_gives_one_expert_per_interval_and_one_denoiser(subject: Subject) -> None:
    experts = subject.split(Intervals((0, 300, 1000)))
    assert [expert.interval for expert in experts] == [(0, 300), (300, 1000)]
    assert all(expert.denoiser is subject.denoiser for expert in experts)


def test_timesteps_are_drawn_from_the_interval(subject: Subject) -> None:
    expert = subject.split(Intervals((0, 300, 305, 1000)))[1]
    drawn = expert.timesteps(200, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(range(300, 305))
