"""The kernel distance between generated and real images (Binkowski et al., 2018)."""

from __future__ import annotations

import attrs
import numpy as np
import torch
from attrs.validators import ge, instance_of
from torch import nn

from moediff.errors import DataError, OptionError
from moediff.roles import Measurement
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.metrics.extractors import EXTRACTORS, INSTALL, figure_name
from moediff_plugins.metrics.features import Features, generated_and_real


@attrs.frozen
class Kernel:
    """Compare generated images with the task's by the squared MMD of k(x, y) = (x.y / D + 1)^3.

    The mean over random subsets of the unbiased estimate (Binkowski et al., 2018, Sec. 4); it may
    be negative, and few images make it noisy but not biased. The figure is called KID only with
    Inception's features; any other extractor gives its name, for example KD[digits], and its
    features are first divided by the root mean square of the real images', because the kernel is
    made for features of about that size (SqueezeNet's squares are 130 on average, and the cubes of
    a few images would be all that counts). The spread is the standard deviation over the subsets,
    as is usual. Subsets overlap and all come from one set of images: to compare two models,
    measure both with several sampling seeds.

    Attributes:
        extractor: a name from `extractors.EXTRACTORS`.
        samples: how many images to generate.
        batch: B, images generated at once.
        subsets: how many subsets.
        subset_size: images of either side in a subset, at most half of the smaller side.
        data: the folder of an extractor's weights, see `extractors.load_extractor`.
    """

    extractor: str = attrs.field(default="digits", validator=attrs.validators.in_(EXTRACTORS))
    samples: int = attrs.field(default=500, validator=[instance_of(int), ge(4)])
    batch: int = attrs.field(default=100, validator=[instance_of(int), ge(1)])
    subsets: int = attrs.field(default=100, validator=[instance_of(int), ge(2)])
    subset_size: int = attrs.field(default=1000, validator=[instance_of(int), ge(2)])
    data: str | None = attrs.field(default=None, converter=attrs.converters.optional(str))

    def measure(self, denoiser: nn.Module, subject: Subject, task: Task, run: Run) -> Measurement:
        if len(task) < 4:
            raise DataError(f"kernel: got a task of {len(task)} images; allowed are 4 or more.")
        generated, real = generated_and_real(
            denoiser, subject, task, run, self.extractor, self.data, self.samples, self.batch
        )
        if self.extractor != "inception":
            scale = np.sqrt(np.mean(real**2))
            generated, real = generated / scale, real / scale
        size = min(self.subset_size, len(generated) // 2, len(real) // 2)
        values = kernel_distances(generated, real, self.subsets, size, run.generator("kernel"))
        name = figure_name("KD", self.extractor)
        spread = float(np.std(values, ddof=1))
        return Measurement(name, float(np.mean(values)), "", self.samples, spread)


def kernel_distances(
    first: Features, second: Features, subsets: int, size: int, generator: torch.Generator
) -> list[float]:
    """The squared MMD of each of `subsets` random subsets of features (n, D) and (m, D).

    Raises:
        OptionError: clean-fid, whose code computes it, is not installed.
    """
    try:
        from cleanfid.fid import kernel_distance
    except ImportError as error:
        raise OptionError(f"kernel: {error}. {INSTALL}") from error
    seed = int(torch.randint(2**32, (), generator=generator))
    state = np.random.get_state()  # clean-fid draws its subsets from the global generator
    try:
        np.random.seed(seed)
        return [kernel_distance(first, second, 1, size) for _ in range(subsets)]
    finally:
        np.random.set_state(state)
