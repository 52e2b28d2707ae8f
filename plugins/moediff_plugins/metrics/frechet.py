"""The Frechet distance between generated and real images (Heusel et al., 2017)."""

from __future__ import annotations

import warnings

import attrs
import numpy as np
import torch
from attrs.validators import ge
from torch import nn

from moediff.errors import OptionError
from moediff.roles import Measurement
from moediff.sampling import generate, initial_noise
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.metrics.extractors import EXTRACTORS, Extractor, load_extractor


@attrs.frozen
class Frechet:
    """Compare `samples` generated images with all of the task's, as Gaussians of features.

    The figure is called FID only with Inception's features; any other extractor gives its name,
    for example FD[digits]. It is biased upwards where either side has few images.

    Attributes:
        extractor: a name from `extractors.EXTRACTORS`.
        samples: how many images to generate.
        batch: B, images generated at once.
    """

    extractor: str = attrs.field(default="digits", validator=attrs.validators.in_(EXTRACTORS))
    samples: int = attrs.field(default=500, validator=ge(2))
    batch: int = attrs.field(default=100, validator=ge(1))

    def measure(self, denoiser: nn.Module, subject: Subject, task: Task, run: Run) -> Measurement:
        extractor = load_extractor(self.extractor)
        generated = generate_images(denoiser, subject, task, run, self.samples, self.batch)
        value = frechet_distance(
            _features(extractor, generated, self.batch),
            _features(extractor, task.samples, self.batch),
        )
        name = "FID" if self.extractor == "inception" else f"FD[{self.extractor}]"
        return Measurement(name, value, "", self.samples)


def generate_images(
    denoiser: nn.Module, subject: Subject, task: Task, run: Run, count: int, batch: int
) -> torch.Tensor:
    """Generate `count` images (n, C, H, W) in [-1, 1] with the run's sampling, on the CPU."""
    seeds = run.sampling.seeds(count)
    conditioning, null = task.prompts(count, subject.device)
    images = []
    for start in run.progress(range(0, count, batch), "generate"):
        rows = slice(start, start + batch)
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
        images.append(part.clamp(-1, 1).cpu())
    return torch.cat(images)


def frechet_distance(
    first: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    second: np.ndarray[tuple[int, int], np.dtype[np.float64]],
) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features (n, D) and (m, D).

    Raises:
        OptionError: clean-fid, whose code computes it, is not installed.
    """
    try:
        from cleanfid.fid import frechet_distance as distance
    except ImportError as error:
        raise OptionError(
            f"frechet: {error}. Install the metrics: pip install moediff[metrics]."
        ) from error
    moments = [(f.mean(axis=0), np.cov(f, rowvar=False)) for f in (first, second)]
    with warnings.catch_warnings():
        # clean-fid passes an argument to sqrtm that SciPy 1.18 removes; hence the pin below it.
        warnings.filterwarnings("ignore", "The `disp` argument", DeprecationWarning)
        return float(distance(*moments[0], *moments[1]))


def _features(
    extractor: Extractor, images: torch.Tensor, batch: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    starts = range(0, len(images), batch)
    with torch.inference_mode():
        parts = [extractor(images[at : at + batch]).double().cpu() for at in starts]
    features: np.ndarray[tuple[int, int], np.dtype[np.float64]] = torch.cat(parts).numpy()
    return features
