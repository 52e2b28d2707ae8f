"""The scoring that the faster ones are measured against: MoEDM Eq. 1 as it is written."""

from __future__ import annotations

import torch

import moediff
from moediff import Sampling, Subject
from moediff.masking import masked_channels
from moediff.sampling import generate, initial_noise


def one_channel_at_a_time(
    subject: Subject, task: moediff.Task, sampling: Sampling, images: int
) -> torch.Tensor:
    """Scores (M,): one generation of `images` images per channel."""
    seeds = sampling.seeds(images)
    dtype = next(subject.denoiser.parameters()).dtype
    noise = initial_noise(seeds, subject.shape).to(dtype)
    conditioning, null = task.prompts(images)

    def images_now() -> torch.Tensor:
        return generate(
            subject.denoiser, subject.scheduler, sampling, noise, conditioning, null, seeds
        )

    distances = []
    with torch.no_grad():
        intact = images_now()
        for width in subject.anatomy.widths.values():
            for mask in 1 - torch.eye(width.count * width.size):
                with masked_channels(subject.denoiser, width, mask):
                    distances.append((images_now() - intact).double().abs().mean())
    return torch.stack(distances)
