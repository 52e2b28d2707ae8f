"""Noise, training targets and the loss, against their formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from moediff import denoising_loss
from moediff.denoising import corrupt
from moediff.errors import OptionError
from tests.conftest import conditioning, tiny_task, tiny_unet

CLEAN = torch.linspace(-1, 1, 2 * 3 * 64, dtype=torch.float64).view(2, 3, 8, 8)
NOISE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TIMES = torch.tensor([0, 700])


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_noise_and_target_follow_the_prediction_type(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    noisy, target = corrupt(scheduler, CLEAN, NOISE, TIMES)
    signal = scheduler.alphas_cumprod.double()[TIMES].sqrt().view(2, 1, 1, 1)
    noise = (1 - scheduler.alphas_cumprod.double()[TIMES]).sqrt().view(2, 1, 1, 1)
    torch.testing.assert_close(noisy, signal * CLEAN + noise * NOISE, rtol=1e-6, atol=1e-6)
    wanted = {
        "epsilon": NOISE,
        "sample": CLEAN,
        "v_prediction": signal * NOISE - noise * CLEAN,
    }[kind]
    torch.testing.assert_close(target, wanted, rtol=1e-6, atol=1e-6)


def test_flow_matching_interpolates_and_predicts_the_velocity() -> None:
    """x_s = (1 - s) x + s e, and the target is dx/ds = e - x (Lipman et al., 2023)."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    times = torch.tensor([1, 700])
    noisy, target = corrupt(scheduler, CLEAN, NOISE, times)
    for row, sigma in enumerate((0.001, 0.7)):
        wanted = (1 - sigma) * CLEAN[row] + sigma * NOISE[row]
        torch.testing.assert_close(noisy[row], wanted, rtol=1e-6, atol=1e-6)
    theirs = scheduler.scale_noise(CLEAN, times.float(), NOISE)  # at the timesteps that it samples
    torch.testing.assert_close(noisy, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(target, NOISE - CLEAN)


def test_an_unknown_prediction_type_is_refused() -> None:
    scheduler = DDPMScheduler(prediction_type="epsilon")
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(OptionError, match="prediction_type: got 'score'"):
        corrupt(scheduler, CLEAN, NOISE, TIMES)


def test_the_loss_is_the_mean_square_and_draws_from_its_generator() -> None:
    net, task, scheduler = tiny_unet("class-conditional"), tiny_task(labelled=True), DDPMScheduler()
    batch = task.batch(4, torch.Generator().manual_seed(0))
    times = torch.tensor([3, 100, 500, 999])
    state = torch.get_rng_state()
    loss = denoising_loss(net, scheduler, batch, times, torch.Generator().manual_seed(1))
    noise = torch.randn(batch.clean.shape, generator=torch.Generator().manual_seed(1))
    noisy = scheduler.add_noise(batch.clean, noise, times)
    wanted = (net(noisy, times, **batch.conditioning).sample - noise).square().mean()
    torch.testing.assert_close(loss, wanted)
    assert loss.requires_grad
    assert torch.equal(state, torch.get_rng_state())
    assert set(batch.conditioning) == set(conditioning(net, 1))
