"""Features of generated and of real images, which the Frechet and the kernel distance share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn

from moediff.sampling import generate, initial_noise
from moediff.storage import settings
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.metrics.extractors import load_extractor

Features = np.ndarray[tuple[int, int], np.dtype[np.float64]]
"""(n, D)."""


def generated_and_real(
    denoiser: nn.Module,
    subject: Subject,
    task: Task,
    run: Run,
    extractor: str,
    data: str | None,
    samples: int,
    batch: int,
) -> tuple[Features, Features]:
    """Features of `samples` generated images and of all of the task's.

    A run with a folder keeps both there, so that another metric, or the same one in another
    process, neither generates again nor looks at the real images again; a killed one goes on
    after the last batch. What a denoiser with hooks generates is never kept, because a hash of
    its weights does not see what they do.

    Args:
        denoiser: what generates.
        subject: the base model; its scheduler and shape are used.
        task: gives the real images and the conditioning of those to generate.
        run: its sampling is used.
        extractor: a name from `extractors.EXTRACTORS`.
        data: see `extractors.load_extractor`.
        samples: how many images to generate.
        batch: B, images at once.
    """
    network = load_extractor(extractor, data).to(subject.device)
    look = (version("moediff"), extractor, network, subject.device.type, batch)

    def real() -> torch.Tensor:
        parts = run.progress(torch.split(task.samples, batch), "look at real images")
        return torch.cat([_look(network, part.to(subject.device)) for part in parts])

    def made() -> torch.Tensor:
        checkpoint = run.checkpoint("features")
        saved = checkpoint.load()
        parts = [saved[0]["features"]] if saved else []
        for images in _batches(denoiser, subject, task, run, samples, batch, sum(map(len, parts))):
            parts = [torch.cat([*parts, _look(network, images)])]
            checkpoint.save({"features": parts[0]}, None)
        return parts[0]

    weights = (str(denoiser), denoiser, getattr(denoiser, "plan", None))
    asked = (settings(subject.scheduler.config), run.sampling, samples, task.prompts(samples))
    return (
        made().double().numpy()
        if _has_hooks(denoiser)
        else _kept(run, "generated-features", (*look, weights, subject.shape, *asked), made),
        _kept(run, "real-features", (*look, task.samples), real),
    )


def generate_images(
    denoiser: nn.Module, subject: Subject, task: Task, run: Run, count: int, batch: int
) -> torch.Tensor:
    """Generate `count` images (n, C, H, W) in [-1, 1] with the run's sampling, on the CPU."""
    return torch.cat([part.cpu() for part in _batches(denoiser, subject, task, run, count, batch)])


def _batches(
    denoiser: nn.Module, subject: Subject, task: Task, run: Run, count: int, batch: int,
    start: int = 0,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """The images of `generate_images` from number `start` on, B at once, on the model's device."""
    seeds = run.sampling.seeds(count)
    conditioning, null = task.prompts(count, subject.device)
    calls = sum(run.sampling.calls(subject.scheduler, Intervals((0, subject.total))))
    for at in run.progress(range(start, count, batch), "generate"):
        rows = slice(at, at + batch)
        with torch.inference_mode():
            part = generate(
                denoiser,
                subject.scheduler,
                run.sampling,
                initial_noise(seeds[rows], subject.shape).to(subject.device),
                {name: value[rows] for name, value in conditioning.items()},
                {name: value[rows] for name, value in null.items()},
                seeds[rows],
            )
        run.spend(samples=len(part) * calls)
        yield part.clamp(-1, 1)


def _look(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        features: torch.Tensor = network(images)
    return features.cpu()


def _kept(
    run: Run, name: str, depends: tuple[Any, ...], compute: Callable[[], torch.Tensor]
) -> Features:
    found = run.stage(
        name,
        depends,
        compute,
        pack=lambda result: ({"features": result}, None),
        unpack=lambda tensors, _: tensors["features"],
    )
    features: Features = found.double().numpy()
    return features


def _has_hooks(denoiser: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())
