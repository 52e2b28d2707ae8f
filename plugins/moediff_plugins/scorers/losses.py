"""What the scorers by gradient share: the denoising loss sample by sample."""

from __future__ import annotations

import torch

from moediff.sampling import predict
from moediff.subject import Subject
from moediff.task import Task, corrupt


def denoising_losses(
    expert: Subject, task: Task, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Mean squared errors (count,) at timesteps of the expert's interval (DiffPruning Eq. 3)."""
    batch = task.batch(count, generator, expert.device)
    timesteps = expert.timesteps(count, generator)  # (count,)
    noise = torch.randn(batch.clean.shape, generator=generator).to(batch.clean)
    noisy, target = corrupt(expert.scheduler, batch.clean, noise, timesteps)
    prediction = predict(expert.denoiser, noisy, timesteps, batch.conditioning)
    return (prediction - target).square().flatten(1).mean(1)
