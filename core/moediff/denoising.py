"""The denoising loss: noise on clean samples, and what the denoiser is trained to predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moediff.errors import OptionError
from moediff.sampling import Call, flows, predict
from moediff.task import Batch


def corrupt(
    scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the noisy samples and the target that the denoiser is trained to predict.

    Args:
        scheduler: the base model's; its `prediction_type` decides the target, and a flow-matching
            scheduler interpolates linearly (Lipman et al., 2023).
        clean: (B, C, H, W).
        noise: (B, C, H, W), standard normal.
        timesteps: (B,) integers in [0, T).

    Raises:
        OptionError: a prediction type that diffusers does not have.
    """
    if flows(scheduler):
        total = scheduler.config.num_train_timesteps
        sigma = (timesteps / total).view(-1, 1, 1, 1).to(clean)  # as samplers name their timesteps
        return (1 - sigma) * clean + sigma * noise, noise - clean
    noisy = scheduler.add_noise(clean, noise, timesteps)
    kinds: Mapping[str, Callable[[], torch.Tensor]] = {
        "epsilon": lambda: noise,
        "sample": lambda: clean,
        "v_prediction": lambda: scheduler.get_velocity(clean, noise, timesteps),
    }
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    if kind not in kinds:
        raise OptionError(
            f"prediction_type: got {kind!r}; allowed are {', '.join(sorted(kinds))}. "
            "Give the scheduler that the base was trained with."
        )
    return noisy, kinds[kind]()


def denoising_loss(
    denoiser: Call,
    scheduler: Any,
    batch: Batch,
    timesteps: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error () of the denoiser on a batch (DiffPruning Eq. 3).

    The noise is drawn on the CPU from `generator`, independently for every row.
    """
    clean = batch.clean
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    noisy, target = corrupt(scheduler, clean, noise, timesteps)
    prediction = predict(denoiser, noisy, timesteps, batch.conditioning)
    return torch.nn.functional.mse_loss(prediction, target)
