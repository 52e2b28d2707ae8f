"""The tool that ours is compared with: it meets the budget, and what it gives can be trained."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

import moediff
from moediff.errors import BudgetError
from moediff_plugins.counters.macs import MACs
from moediff_plugins.tuners.finetune import Finetune
from tests.conftest import conditioning, tiny_task, tiny_unet

pytest.importorskip("torch_pruning")
from benchmarks.torch_pruning_baseline import prune_with_torch_pruning


def share_of(pruned: torch.nn.Module, subject: moediff.Subject) -> float:
    counter = MACs()
    return counter.count(pruned).value / counter.count(subject.denoiser).value


@pytest.mark.slow
@pytest.mark.parametrize("keep_path", [False, True])
@pytest.mark.parametrize("kind", ["plain", "class-conditional"])
def test_it_lands_near_the_share_and_what_remains_can_be_trained(
    kind: str, keep_path: bool, scheduler: DDPMScheduler
):
    subject = moediff.installed().dissect(tiny_unet(kind, block_out_channels=(16, 32)), scheduler)
    task = tiny_task(labelled=kind == "class-conditional")
    before = {name: value.clone() for name, value in subject.denoiser.state_dict().items()}
    state = torch.get_rng_state()
    net = prune_with_torch_pruning(subject, task, 0.6, seed=0, keep_path=keep_path)
    assert torch.equal(torch.get_rng_state(), state)
    after = subject.denoiser.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for m in (net, subject.denoiser) for p in m.parameters())
    assert 0.5 < share_of(net, subject) <= 0.6
    if keep_path:
        up = net.up_blocks[-1].resnets[-1].conv2.out_channels
        assert (net.conv_in.out_channels, up) == (16, 16)

    # An anatomy of its own: it is a denoiser as any other.
    own = moediff.installed().dissect(net, scheduler)
    plan = moediff.Plan(moediff.Intervals.uniform(1000, 1), (moediff.Blueprint(),))
    mixture = moediff.ExpertMixture.from_experts([own], plan)
    run = moediff.Run()
    Finetune(steps=10, batch=8, learning_rate=3e-3, ema=0).recover(mixture, task, subject, run)
    sample, extra = torch.zeros(2, 3, 8, 8), conditioning(subject.denoiser, 2)
    with torch.no_grad():
        trained, untrained = (m(sample, 5, **extra).sample for m in (mixture, net))
    assert trained.shape == sample.shape
    assert not torch.allclose(trained, untrained)
    losses = run.records["free/loss-finetune"]
    assert losses[-3:].mean() < losses[:3].mean()


@pytest.mark.slow
def test_its_seed_decides_and_an_impossible_share_is_refused(scheduler: DDPMScheduler):
    subject = moediff.installed().dissect(tiny_unet(add_attention=False), scheduler)
    task = tiny_task()
    first, again = (prune_with_torch_pruning(subject, task, 0.7, seed=3) for _ in range(2))
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(BudgetError, match=r"0\.001"):
        prune_with_torch_pruning(subject, task, 0.001, seed=0)
