"""How images are generated: one value used alike by scoring, cost, distillation and metrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import diffusers
import torch
from torch import nn

from moediff.errors import OptionError, UnknownNameError, did_you_mean
from moediff.storage import settings
from moediff.timesteps import Intervals

Conditioning = Mapping[str, torch.Tensor]

Call = Callable[..., Any]
"""A denoiser, or anything that is called as one is."""

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow-match": "FlowMatchEulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
}


def trains(scheduler: Any) -> bool:
    """Whether what a scheduler noises goes into a denoiser unscaled, unlike x + sigma e."""
    return float(getattr(scheduler, "init_noise_sigma", 1)) == 1


def check_training(scheduler: Any) -> None:
    """Refuse a base model's scheduler that does not train.

    Raises:
        OptionError: the denoising loss would hand its inputs over unscaled.
    """
    if not trains(scheduler):
        raise OptionError(
            f"scheduler: got a {type(scheduler).__name__}, which samples and does not train; "
            "allowed is one that noises as the base was trained, such as "
            "DDPMScheduler.from_config(scheduler.config). Name yours in the sampling instead."
        )


def _known_scheduler(_: object, __: attrs.Attribute[str], name: str) -> None:
    known = SCHEDULERS.get(name, name)
    if not known.endswith("Scheduler") or known not in dir(diffusers):
        raise UnknownNameError(
            f"scheduler: got {name!r}, which is neither a short name nor a scheduler class of "
            f"diffusers.{did_you_mean(name, SCHEDULERS)}"
        )


@attrs.frozen
class Sampling:
    """A scheduler, its number of steps, the guidance scale and the seed of the first image.

    `scheduler` is a short name (see `SCHEDULERS`) or the name of any diffusers scheduler class.
    `guidance` is the scale of classifier-free guidance (Ho and Salimans, 2022); at 1 the
    unconditional pass, and its cost, fall away.
    """

    scheduler: str = attrs.field(default="ddim", validator=_known_scheduler)
    steps: int = attrs.field(
        default=20, validator=[attrs.validators.instance_of(int), attrs.validators.ge(1)]
    )
    guidance: float = attrs.field(default=1.0, converter=float, validator=attrs.validators.ge(0))
    seed: int = attrs.field(
        default=0, validator=[attrs.validators.instance_of(int), attrs.validators.ge(0)]
    )

    def prepare(self, base: Any, device: torch.device | str = "cpu") -> Any:
        """Build this sampling's scheduler from the base model's, with its timesteps set.

        A base with learned variance is sampled with the small fixed one; see `predict`.
        """
        cls = getattr(diffusers, SCHEDULERS.get(self.scheduler, self.scheduler))
        if flows(cls) != flows(base):
            raise OptionError(
                f"scheduler: got {self.scheduler!r} for a base that was trained with a "
                f"{type(base).__name__}; flow matching samples what flow matching trained, and "
                "nothing else. Give the sampling another scheduler."
            )
        learned = str(base.config.get("variance_type")).startswith("learned")
        changes = {"variance_type": "fixed_small"} if learned else {}
        # Without diffusers' bookkeeping, which lets a value that the base's class has by default
        # give way to the default of the sampling's class, its noise schedule too.
        scheduler = cls.from_config({**settings(base.config), **changes})
        total = scheduler.config.num_train_timesteps
        if self.steps > total:
            raise OptionError(
                f"steps: got {self.steps}; allowed is 1 to {total}, the timesteps that the base "
                "model was trained with."
            )
        try:
            scheduler.set_timesteps(self.steps, device=device)
        except ValueError as error:  # such as PNDM's, which needs four steps to start
            raise OptionError(
                f"steps: {cls.__name__} cannot make {self.steps} of them ({error}). Ask for more."
            ) from error
        return scheduler

    def seeds(self, count: int) -> tuple[int, ...]:
        """One seed per image, so that an image does not depend on the batch that it is in."""
        return tuple(self.seed * 1_000_003 + index for index in range(count))

    def calls(self, base: Any, intervals: Intervals) -> tuple[int, ...]:
        """Denoiser calls per image that each interval answers for, (N,).

        Counted from the scheduler's own timesteps, so solvers that call twice per step and
        schedules that are not linear are priced as they run; guidance doubles every call.
        """
        counts = [0] * len(intervals)
        for timestep in self.prepare(base).timesteps:
            counts[int(intervals.route(timestep))] += 1
        return tuple(count * (1 if self.guidance == 1 else 2) for count in counts)


def flows(scheduler: Any) -> bool:
    """Whether a scheduler, or a class of them, is one of flow matching (Lipman et al., 2023)."""
    return not hasattr(scheduler, "add_noise")


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise (B, C, H, W) on the CPU, one generator per image."""
    draws = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws)


def predict(
    denoiser: Call,
    sample: torch.Tensor,
    timestep: Any,
    conditioning: Conditioning,
    *,
    whole: bool = False,
) -> torch.Tensor:
    """Call a denoiser and return its prediction (B, C, H, W).

    A denoiser with learned variance (Nichol and Dhariwal, 2021; Guided Diffusion has it) has twice
    the channels: the prediction and how the variance interpolates. Sampling and the denoising loss
    use the first half; `whole` returns both (B, 2C, H, W), which distillation compares.
    """
    fitting, words = fit(denoiser, sample, conditioning)
    output: torch.Tensor = denoiser(fitting, timestep, **words, return_dict=False)[0]
    return (output if whole else output[:, : sample.shape[1]]).to(sample.dtype)


def fit(
    denoiser: Call, sample: torch.Tensor, conditioning: Conditioning
) -> tuple[torch.Tensor, Conditioning]:
    """A sample and its conditioning in the floats of a denoiser, such as float16."""
    # The first weight, because diffusers' `dtype` looks at every module, at every call.
    weight = next(denoiser.parameters(), sample) if isinstance(denoiser, nn.Module) else sample
    computes = weight.is_floating_point() and weight.dtype.itemsize > 1  # eight bits only store
    dtype = weight.dtype if computes else sample.dtype
    words = {name: v.to(dtype) if v.is_floating_point() else v for name, v in conditioning.items()}
    return sample.to(dtype), words


def generate(
    denoiser: Call,
    base_scheduler: Any,
    sampling: Sampling,
    noise: torch.Tensor,
    conditioning: Conditioning,
    null: Conditioning,
    seeds: Sequence[int],
) -> torch.Tensor:
    """Generate images (B, C, H, W) from `noise` (B, C, H, W); gradients flow if they are on.

    Args:
        denoiser: anything that is called like a diffusers UNet.
        base_scheduler: the scheduler that the denoiser was trained with.
        sampling: scheduler, steps and guidance to use.
        noise: standard normal noise; equal rows stay equal under every scheduler.
        conditioning: keyword tensors with B rows, for example `class_labels`.
        null: the unconditional counterpart, needed when the guidance is not 1.
        seeds: B seeds for the schedulers that draw noise between steps.

    Raises:
        OptionError: guidance was asked for and `null` is empty.
    """
    guided = sampling.guidance != 1
    if guided and not null:
        raise OptionError(
            f"guidance: got {sampling.guidance}, but the task has no null conditioning. Give the "
            "task a null_label that the base was trained with, or set guidance to 1."
        )
    scheduler = sampling.prepare(base_scheduler, noise.device)
    extra: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    sample = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    for timestep in scheduler.timesteps:
        scaled = sample
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(sample, timestep)
        prediction = predict(denoiser, scaled, timestep, conditioning)
        if guided:
            free = predict(denoiser, scaled, timestep, null)
            prediction = free + sampling.guidance * (prediction - free)
        sample = scheduler.step(prediction, timestep, sample, return_dict=False, **extra)[0]
    return sample
