"""The Frechet distance between generated and real images (Heusel et al., 2017)."""

from __future__ import annotations

import warnings

import attrs
import numpy as np
from attrs.validators import ge, instance_of
from torch import nn

from moediff.errors import OptionError
from moediff.roles import Measurement
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.metrics.extractors import EXTRACTORS, INSTALL, figure_name
from moediff_plugins.metrics.features import Features, generated_and_real


@attrs.frozen
class Frechet:
    """Compare `samples` generated images with all of the task's, as Gaussians of features.

    The figure is called FID only with Inception's features; any other extractor gives its name,
    for example FD[digits]. It is biased upwards where either side has few images. In a run with a
    folder, `kernel` with the same settings uses the same generated images.

    Attributes:
        extractor: a name from `extractors.EXTRACTORS`.
        samples: how many images to generate.
        batch: B, images generated at once.
        data: the folder of an extractor's weights, see `extractors.load_extractor`.
    """

    extractor: str = attrs.field(default="digits", validator=attrs.validators.in_(EXTRACTORS))
    samples: int = attrs.field(default=500, validator=[instance_of(int), ge(2)])
    batch: int = attrs.field(default=100, validator=[instance_of(int), ge(1)])
    data: str | None = attrs.field(default=None, converter=attrs.converters.optional(str))

    def measure(self, denoiser: nn.Module, subject: Subject, task: Task, run: Run) -> Measurement:
        generated, real = generated_and_real(
            denoiser, subject, task, run, self.extractor, self.data, self.samples, self.batch
        )
        value = frechet_distance(generated, real)
        return Measurement(figure_name("FD", self.extractor), value, "", self.samples)


def frechet_distance(first: Features, second: Features) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features (n, D) and (m, D).

    Raises:
        OptionError: clean-fid, whose code computes it, is not installed.
    """
    try:
        from cleanfid.fid import frechet_distance as distance
    except ImportError as error:
        raise OptionError(f"frechet: {error}. {INSTALL}") from error
    moments = [(f.mean(axis=0), np.cov(f, rowvar=False)) for f in (first, second)]
    with warnings.catch_warnings():
        # clean-fid passes an argument to sqrtm that SciPy 1.18 removes; hence the pin below it.
        warnings.filterwarnings("ignore", "The `disp` argument", DeprecationWarning)
        return float(distance(*moments[0], *moments[1]))
