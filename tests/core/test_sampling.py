"""Sampling: calls from the real timesteps, images that do not depend on their batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import nn

from moediff import Intervals, Sampling, generate
from moediff.errors import OptionError, UnknownNameError
from moediff.sampling import SCHEDULERS, check_training, initial_noise, predict
from tests.conftest import base_scheduler, conditioning, tiny_unet

BASE = DDPMScheduler(num_train_timesteps=1000)
FLOW = FlowMatchEulerDiscreteScheduler()
HALVES = Intervals((0, 500, 1000))


class Watched(nn.Module):
    """Notes the timesteps that a real denoiser is called with."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[float] = []

    def forward(self, sample: torch.Tensor, timestep: Any, **kwargs: Any) -> Any:
        self.seen.append(float(timestep))
        return self.inner(sample, timestep, **kwargs)


@pytest.mark.parametrize(
    ("name", "total"),
    [(name, 19 if name in ("heun", "pndm") else 10) for name in sorted(SCHEDULERS)],
)
def test_calls_count_every_denoiser_call(name: str, total: int) -> None:
    calls = Sampling(name, steps=10).calls(base_scheduler(name), HALVES)
    assert sum(calls) == total
    guided = Sampling(name, steps=10, guidance=3).calls(base_scheduler(name), HALVES)
    assert guided == tuple(2 * c for c in calls)


@pytest.mark.parametrize(("name", "late"), [("ddim", 5), ("pndm", 14), ("heun", 9)])
def test_share_of_late_calls_is_not_the_interval_length(name: str, late: int) -> None:
    assert Sampling(name, steps=10).calls(BASE, HALVES)[1] == late


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_calls_are_what_generate_really_makes(name: str, guidance: float) -> None:
    net = Watched(tiny_unet("class-conditional"))
    sampling = Sampling(name, steps=4, guidance=guidance)
    labels, null = conditioning(net.inner, 2), {"class_labels": torch.tensor([3, 3])}
    with torch.no_grad():
        noise = initial_noise((0, 1), (3, 8, 8))
        generate(net, base_scheduler(name), sampling, noise, labels, null, (0, 1))
    made = Counter(int(HALVES.route(t)) for t in net.seen)
    assert (made[0], made[1]) == sampling.calls(base_scheduler(name), HALVES)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    net, sampling, base = (
        tiny_unet().double(),
        Sampling(name, steps=4, seed=5),
        base_scheduler(name),
    )
    seeds = sampling.seeds(3)
    noise = initial_noise(seeds, (3, 8, 8)).double()
    with torch.no_grad():
        together = generate(net, base, sampling, noise, {}, {}, seeds)
        for i in range(3):
            alone = generate(net, base, sampling, noise[i : i + 1], {}, {}, seeds[i : i + 1])
            torch.testing.assert_close(alone[0], together[i], rtol=1e-9, atol=1e-9)


def test_a_stochastic_scheduler_draws_from_the_seeds_only() -> None:
    net, sampling = tiny_unet(), Sampling("ddpm", steps=4)
    noise = initial_noise((0,), (3, 8, 8))
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second, other = (
            generate(net, BASE, sampling, noise, {}, {}, seeds) for seeds in ((7,), (7,), (8,))
        )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_guidance_follows_its_formula() -> None:
    """One DDIM step: eps = null + g (cond - null) (Ho and Salimans, 2022)."""
    net, sampling = tiny_unet("class-conditional"), Sampling("ddim", steps=1, guidance=3)
    noise = initial_noise((0, 1), (3, 8, 8))
    labels, null = torch.tensor([0, 1]), torch.tensor([3, 3])
    scheduler = sampling.prepare(BASE)
    timestep = scheduler.timesteps[0]
    with torch.no_grad():
        made = generate(
            net, BASE, sampling, noise, {"class_labels": labels}, {"class_labels": null}, (0, 1)
        )
        with_class = net(noise, timestep, class_labels=labels).sample
        without = net(noise, timestep, class_labels=null).sample
    wanted = scheduler.step(without + 3 * (with_class - without), timestep, noise).prev_sample
    torch.testing.assert_close(made, wanted)


def test_guidance_without_a_null_is_refused() -> None:
    noise = initial_noise((0,), (3, 8, 8))
    with pytest.raises(OptionError, match=r"guidance: got 2\.0, but the task has no null"):
        generate(tiny_unet(), BASE, Sampling(steps=2, guidance=2), noise, {}, {}, (0,))


def test_gradients_flow_through_generation() -> None:
    noise = initial_noise((0,), (3, 8, 8)).requires_grad_(True)
    image = generate(tiny_unet(), BASE, Sampling(steps=2), noise, {}, {}, (0,))
    (gradient,) = torch.autograd.grad(image.square().sum(), noise)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_predict_leaves_a_learned_variance_out_unless_asked_for_the_whole() -> None:
    net, sample = tiny_unet(out_channels=6), torch.zeros(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(predict(net, sample, 3, {}), net(sample, 3).sample[:, :3])
        assert torch.equal(predict(net, sample, 3, {}, whole=True), net(sample, 3).sample)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmsolver++", "euler", "heun", "pndm"])
def test_a_base_with_learned_variance_is_sampled_with_the_fixed_one(name: str) -> None:
    net, noise = tiny_unet(out_channels=6), initial_noise((0,), (3, 8, 8))
    images = []
    for kind in ("fixed_small", "learned_range", "learned"):
        base = DDPMScheduler(variance_type=kind)
        with torch.no_grad():
            images.append(generate(net, base, Sampling(name, steps=4), noise, {}, {}, (0,)))
        assert base.config.variance_type == kind
    assert images[0].isfinite().all()
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_seeds_and_noise_are_per_image() -> None:
    sampling = Sampling(seed=2)
    assert sampling.seeds(4)[:2] == sampling.seeds(2)
    assert not set(sampling.seeds(1000)) & set(Sampling(seed=3).seeds(1000))
    noise = initial_noise(sampling.seeds(4), (3, 8, 8))
    assert torch.equal(noise[:2], initial_noise(sampling.seeds(2), (3, 8, 8)))


def test_a_diffusers_class_name_is_a_scheduler_too() -> None:
    scheduler = Sampling("UniPCMultistepScheduler", steps=5).prepare(BASE)
    assert type(scheduler).__name__ == "UniPCMultistepScheduler"
    assert len(scheduler.timesteps) == 5


@pytest.mark.parametrize(
    ("name", "hint"), [("dimm", "Did you mean 'ddim'"), ("UNet2DModel", "neither a short name")]
)
def test_an_unknown_scheduler_is_refused(name: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=hint):
        Sampling(name)


@pytest.mark.parametrize("options", [{"steps": 0}, {"guidance": -1}, {"seed": -1}])
def test_values_outside_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)


def test_steps_that_a_scheduler_cannot_make_are_refused() -> None:
    with pytest.raises(OptionError, match="steps: PNDMScheduler cannot make 2 of them"):
        Sampling("pndm", steps=2).prepare(BASE)


def test_more_steps_than_timesteps_is_refused() -> None:
    with pytest.raises(OptionError, match="steps: got 1001; allowed is 1 to 1000"):
        Sampling(steps=1001).prepare(BASE)


@pytest.mark.parametrize(
    ("name", "base"),
    [("flow-match", BASE), ("ddim", FLOW)],
    ids=["flow of a diffusion base", "diffusion of a flow base"],
)
def test_a_base_is_sampled_as_it_was_trained(name: str, base: Any) -> None:
    with pytest.raises(OptionError, match=f"scheduler: got '{name}' for a base that was trained"):
        Sampling(name, 4).prepare(base)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_scheduler_that_cannot_train_is_refused(kind: Any) -> None:
    for trains in (BASE, DDIMScheduler(), FLOW):
        check_training(trains)
    with pytest.raises(OptionError, match=r"DDPMScheduler\.from_config"):
        check_training(kind.from_config(BASE.config))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_denoiser_is_called_in_its_own_floats(dtype: torch.dtype) -> None:
    net = tiny_unet("class-conditional").eval()
    sample, words = torch.randn(2, 3, 8, 8), conditioning(net, 2)
    with torch.no_grad():
        wanted = predict(net, sample, torch.tensor([3, 700]), words)
        found = predict(net.to(dtype), sample, torch.tensor([3, 700]), words)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "euler", "heun", "pndm"])
def test_a_scheduler_made_here_samples_as_one_that_was_stored(name: str, tmp_path: Path) -> None:
    made = DDPMScheduler()
    made.save_pretrained(tmp_path)
    stored = DDPMScheduler.from_pretrained(tmp_path)
    ours, theirs = (Sampling(name, 5).prepare(base) for base in (made, stored))
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for scheduler in (ours, theirs):
        assert scheduler.config.beta_end == made.config.beta_end
        assert torch.allclose(scheduler.alphas_cumprod, made.alphas_cumprod)
