"""Exact ablation scores in batches against one channel at a time, on the digits base."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

import moediff
from benchmarks.one_by_one import one_channel_at_a_time
from benchmarks.pairs import paired_ratio
from moediff import Anatomy, Run, Sampling, Subject
from moediff_plugins.digits import load_base, load_images
from moediff_plugins.scorers.ablation_l1 import AblationL1


def digits(*, double: bool) -> tuple[Subject, moediff.Task]:
    """The digits base with one of its layers, a ResBlock and its attention, in view."""
    denoiser, scheduler = load_base()
    subject = moediff.installed().dissect(denoiser.double() if double else denoiser, scheduler)
    layer = next(layer for layer in subject.anatomy.layers if len(layer.widths) == 2)
    subject = attrs.evolve(subject, anatomy=Anatomy((layer,)))
    return subject, moediff.Task.from_arrays(*load_images("train"))


def layer_sum(scores: moediff.Scores, subject: Subject) -> float:
    """The layer's own unit, which sums every channel's distance."""
    (index,) = subject.anatomy.layer_units.values()
    return float(scores.values[index])


@pytest.mark.parametrize("images", [1, 8])
def test_batches_are_faster_than_one_channel_at_a_time(benchmark: Any, images: int) -> None:
    subject, task = digits(double=False)
    sampling = Sampling(steps=1)
    scorer = AblationL1(images=images)

    def in_batches() -> moediff.Scores:
        return scorer.score(subject, task, Run(sampling=sampling))

    def one_by_one() -> torch.Tensor:
        return one_channel_at_a_time(subject, task, sampling, images)

    benchmark.pedantic(in_batches, rounds=5, warmup_rounds=1)
    median, low, high = paired_ratio(one_by_one, in_batches, pairs=20)
    benchmark.extra_info |= {"ratio": median, "quartiles": (low, high), "images": images}
    print(f"{images} images: {median:.2f}x faster in batches, quartiles {low:.2f} to {high:.2f}")
    assert median >= 2.5


def test_batches_give_the_same_scores_as_one_channel_at_a_time() -> None:
    # A score is a small difference of images; in float32 their rounding would hide it.
    subject, task = digits(double=True)
    for sampling in (Sampling(steps=1), Sampling(steps=4)):
        scores = AblationL1(images=2).score(subject, task, Run(sampling=sampling))
        alone = one_channel_at_a_time(subject, task, sampling, 2)
        assert layer_sum(scores, subject) == pytest.approx(float(alone.sum()), rel=1e-9)
        widths = list(subject.anatomy.widths.values())
        parts = torch.split(alone, [width.count * width.size for width in widths])
        for width, part in zip(widths, parts, strict=True):
            found = scores.values[subject.anatomy.spans[width.name]]
            wanted = part.view(width.count, width.size).sum(1)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
