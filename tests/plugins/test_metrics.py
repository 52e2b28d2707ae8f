"""Metrics: the figures are what they are called."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moediff
from moediff.errors import UnknownNameError
from moediff_plugins import digits
from moediff_plugins.metrics.extractors import load_extractor
from moediff_plugins.metrics.frechet import Frechet, frechet_distance, generate_images
from moediff_plugins.metrics.latency import Latency


@pytest.fixture(scope="module")
def base():
    denoiser, scheduler = digits.load_base()
    return moediff.installed().dissect(denoiser, scheduler)


@pytest.fixture(scope="module")
def threes_and_eights():
    task = moediff.Task.from_arrays(*digits.load_images(), null_label=digits.NULL_LABEL)
    return task.subset([3, 8])


def test_the_distance_of_gaussians_by_hand():
    """Equal covariances leave |mu1 - mu2|^2; scaling one by s^2 adds D (s - 1)^2."""
    features = np.random.default_rng(0).standard_normal((4000, 3))
    features = (features - features.mean(axis=0)) @ np.linalg.inv(
        np.linalg.cholesky(np.cov(features, rowvar=False))
    ).T
    shift = np.array([1.0, -2.0, 0.5])
    assert frechet_distance(features, features + shift) == pytest.approx(5.25, abs=1e-6)
    assert frechet_distance(features, 3 * features) == pytest.approx(3 * 4, abs=1e-6)


def test_generated_digits_are_near_the_real_ones_and_noise_is_not(base, threes_and_eights):
    run = moediff.Run(sampling=moediff.Sampling("ddim", 10))
    metric = Frechet("digits", samples=120)
    figure = metric.measure(base.denoiser, base, threes_and_eights, run)
    assert (figure.name, figure.samples) == ("FD[digits]", 120)
    extractor = load_extractor("digits")
    with torch.inference_mode():
        noise = extractor(torch.rand(120, 1, 8, 8) * 2 - 1).double().numpy()
        real = extractor(threes_and_eights.samples).double().numpy()
    assert figure.value < frechet_distance(noise, real) / 10


def test_generation_does_not_depend_on_the_batch(base, threes_and_eights):
    run = moediff.Run(sampling=moediff.Sampling("ddim", 3))
    whole = generate_images(base.denoiser, base, threes_and_eights, run, 6, 6)
    parts = generate_images(base.denoiser, base, threes_and_eights, run, 6, 2)
    assert whole.shape == (6, 1, 8, 8)
    assert torch.allclose(whole, parts, atol=1e-4)
    assert whole.abs().max() <= 1


def test_latency_of_the_base_beside_itself_is_about_one(base, threes_and_eights):
    run = moediff.Run(sampling=moediff.Sampling("ddim", 2))
    figure = Latency(batch=2, pairs=9).measure(base.denoiser, base, threes_and_eights, run)
    assert (figure.unit, figure.samples) == ("x base", 9)
    assert 0.5 < figure.value < 2


def test_an_unknown_extractor_names_the_known_ones():
    with pytest.raises(UnknownNameError, match="digits"):
        load_extractor("digit")
    with pytest.raises(ValueError, match="extractor"):
        Frechet("nothing")
