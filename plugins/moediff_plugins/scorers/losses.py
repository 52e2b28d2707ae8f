"""What the scorers by gradient share: the denoising loss by sample, and its slopes on weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moediff.denoising import corrupt
from moediff.sampling import predict
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run


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


def trained_weights(expert: Subject) -> list[torch.Tensor]:
    """The weights of convolutions and linear modules that the base left open."""
    return [p for p in expert.denoiser.parameters() if p.requires_grad and p.ndim > 1]


def weight_slopes(
    expert: Subject,
    weights: Sequence[torch.Tensor],
    task: Task,
    samples: int,
    batch: int,
    generator: Callable[[int], torch.Generator],
    run: Run,
    bar: str | None = None,
) -> tuple[float, list[torch.Tensor]]:
    """The mean denoising loss of `samples` samples, and its gradient on every weight.

    Args:
        expert: timesteps are drawn from its interval.
        weights: tensors of its denoiser; one that the loss does not reach has a slope of 0.
        task: the samples.
        samples: how many.
        batch: B, samples per pass.
        generator: the number of a pass's first sample -> its generator.
        run: the run.
        bar: the title of a progress bar over the passes; None draws none.
    """
    loss, slopes = 0.0, [torch.zeros_like(weight) for weight in weights]
    starts = range(0, samples, batch)
    for start in starts if bar is None else run.progress(starts, bar):
        rows = min(batch, samples - start)
        with torch.enable_grad():
            part = denoising_losses(expert, task, rows, generator(start)).sum() / samples
            found = torch.autograd.grad(part, weights, allow_unused=True)
        loss += part.item()
        for total, slope in zip(slopes, found, strict=True):
            total += 0 if slope is None else slope
        run.spend(samples=rows)
    return loss, slopes
