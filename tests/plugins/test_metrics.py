"""Metrics: the figures are what they are called."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import moediff
from moediff import Blueprint, ExpertMixture, Intervals, Plan
from moediff.errors import ArtefactError, DataError, UnknownNameError
from moediff_plugins import digits
from moediff_plugins.metrics.extractors import SQUEEZENET, figure_name, load_extractor
from moediff_plugins.metrics.features import generate_images
from moediff_plugins.metrics.frechet import Frechet, frechet_distance
from moediff_plugins.metrics.kernel import Kernel, kernel_distances
from moediff_plugins.metrics.latency import Latency
from moediff_plugins.metrics.loss import Loss
from moediff_plugins.metrics.memory import Memory, live_peak, weight_bytes
from tests.conftest import tiny_task, tiny_unet


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


def test_only_inceptions_features_give_the_famous_names():
    assert (figure_name("FD", "inception"), figure_name("KD", "inception")) == ("FID", "KID")
    assert (figure_name("FD", "squeezenet"), figure_name("KD", "digits")) == (
        "FD[squeezenet]",
        "KD[digits]",
    )


# The extractor for colour images. Weights are random here, in a file of the original's format.

FIRES = {
    2: (96, 16, 64), 3: (128, 16, 64), 4: (128, 32, 128), 5: (256, 32, 128),
    6: (256, 48, 192), 7: (384, 48, 192), 8: (384, 64, 256), 9: (512, 64, 256),
}  # fmt: skip
"""Channels in, squeezed, and out of each half (Iandola et al., 2016, Table 1)."""


@pytest.fixture(scope="module")
def caffe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random SqueezeNet weights under Caffe's names."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"conv1": (96, 3, 7, 7), "conv_final": (1000, 512, 1, 1)}
    for n, (entering, squeezed, half) in FIRES.items():
        shapes[f"fire{n}/squeeze"] = (squeezed, entering, 1, 1)
        shapes[f"fire{n}/e1"] = (half, squeezed, 1, 1)
        shapes[f"fire{n}/e3"] = (half, squeezed, 3, 3)
    tensors = {}
    for name, shape in shapes.items():
        scale = (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    folder = tmp_path_factory.mktemp("caffe")
    save_file(tensors, folder / SQUEEZENET)
    return folder


def by_the_description(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """SqueezeNet's features (n, 512) of bytes (n, 3, H, W), operator by operator."""

    def convolve(name: str, x: torch.Tensor, **options: int) -> torch.Tensor:
        return F.relu(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options))

    bgr = images.float()[:, [2, 1, 0]] - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    x = convolve("conv1", F.interpolate(bgr, (227, 227), mode="bilinear"), stride=2)
    for n in FIRES:
        if n in (2, 5, 9):
            x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        x = convolve(f"fire{n}/squeeze", x)
        x = torch.cat([convolve(f"fire{n}/e1", x), convolve(f"fire{n}/e3", x, padding=1)], 1)
    return x.mean(dim=(2, 3))


def test_squeezenet_is_the_network_that_the_weights_were_trained_in(caffe):
    images = torch.randint(256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    state = torch.random.get_rng_state()
    extractor = load_extractor("squeezenet", str(caffe))
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.inference_mode():
        found = extractor(images / 127.5 - 1)
        wanted = by_the_description(load_file(caffe / SQUEEZENET), images)
    assert found.shape == (5, 512)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    assert wanted.std(dim=0).median() > 0.1  # they do tell the images apart


def test_squeezenet_takes_grey_images_and_no_latents(caffe):
    extractor = load_extractor("squeezenet", str(caffe))
    grey = torch.rand(1, 1, 8, 8) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(extractor(grey), extractor(grey.expand(1, 3, 8, 8)))
        with pytest.raises(DataError, match="4 channels"):
            extractor(torch.zeros(1, 4, 8, 8))
        with pytest.raises(DataError, match=r"\(3, 32, 32\).*squeezenet"):
            load_extractor("digits")(torch.zeros(1, 3, 32, 32))


def test_the_weights_are_looked_for_where_the_user_says(caffe, tmp_path, monkeypatch):
    monkeypatch.delenv("MOEDIFF_DATA", raising=False)
    with pytest.raises(ArtefactError, match=r"no folder was given.*MOEDIFF_DATA"):
        load_extractor("squeezenet")
    monkeypatch.setenv("MOEDIFF_DATA", str(tmp_path))
    with pytest.raises(ArtefactError, match=f"{SQUEEZENET}, and it is not in {tmp_path}"):
        load_extractor("squeezenet")
    load_extractor("squeezenet", str(caffe))  # the field goes before the environment
    monkeypatch.setenv("MOEDIFF_DATA", str(caffe))
    load_extractor("squeezenet")
    assert Frechet("squeezenet", data=caffe) == Frechet("squeezenet", data=str(caffe))


@pytest.mark.parametrize("damage", ["truncated", "missing", "strange", "shape"])
def test_other_weights_are_refused(caffe, tmp_path, damage):
    file = tmp_path / SQUEEZENET
    tensors = load_file(caffe / SQUEEZENET)
    match damage:
        case "missing":
            del tensors["fire5/e3.bias"]
        case "strange":
            tensors["fire10/e1.bias"] = torch.zeros(3)
        case "shape":
            tensors["conv1.weight"] = torch.zeros(96, 3, 3, 3)
    save_file(tensors, file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match="is not SqueezeNet"):
        load_extractor("squeezenet", str(tmp_path))


REAL = Path(os.environ.get("MOEDIFF_DATA", "no-folder"))


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / SQUEEZENET).is_file(), reason="needs SqueezeNet's weights")
def test_the_real_features_tell_cifars_classes_apart():
    """The nearest mean of 60 images per class: chance is 10 %."""
    from benchmarks.cifar import load_images

    extractor = load_extractor("squeezenet", str(REAL))
    task = load_images(REAL, "test")
    with torch.inference_mode():
        features = extractor(task.samples[:900])
    labels = task.conditioning["class_labels"][:900]
    means = torch.stack([features[:600][labels[:600] == c].mean(dim=0) for c in range(10)])
    right = torch.cdist(features[600:], means).argmin(dim=1) == labels[600:]
    assert right.float().mean() > 0.4


# The kernel distance.


def squared_mmd(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """The unbiased estimate (Binkowski et al., 2018, Eq. 4), a pair at a time."""

    def kernel(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    def within(features: np.ndarray[Any, Any]) -> float:
        return np.mean([kernel(x, y) for x, y in itertools.permutations(features, 2)])

    between = np.mean([kernel(x, y) for x in first for y in second])
    return within(first) + within(second) - 2 * between


def test_the_kernel_distance_pair_by_pair():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((12, 5)), rng.standard_normal((12, 5)) + 0.5
    # A subset of everything is no choice, so every one of them gives the same.
    found = kernel_distances(first, second, 3, 12, torch.Generator())
    assert found == pytest.approx([squared_mmd(first, second)] * 3, rel=1e-12)


def test_the_kernel_distance_is_unbiased_where_the_frechet_distance_is_not():
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal((40, 4)), rng.standard_normal((40, 4))) for _ in range(200)]
    values = [kernel_distances(a, b, 1, 40, torch.Generator())[0] for a, b in pairs]
    assert abs(np.mean(values)) < 3 * np.std(values) / len(values) ** 0.5
    assert min(values) < 0 < min(frechet_distance(a, b) for a, b in pairs)


def test_subsets_come_from_the_runs_generator_alone():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((60, 4)), rng.standard_normal((60, 4))

    def draw(seed: int) -> list[float]:
        return kernel_distances(first, second, 5, 10, torch.Generator().manual_seed(seed))

    np.random.seed(7)
    wanted = np.random.random()
    np.random.seed(7)
    once = draw(0)
    assert np.random.random() == wanted
    assert draw(0) == once
    assert draw(1) != once
    assert len(set(once)) == 5


def test_the_kernel_metric_knows_digits_from_noise(base, threes_and_eights):
    run = moediff.Run(sampling=moediff.Sampling("ddim", 10))
    figure = Kernel("digits", samples=120).measure(base.denoiser, base, threes_and_eights, run)
    assert (figure.name, figure.samples) == ("KD[digits]", 120)
    extractor = load_extractor("digits")
    made = generate_images(base.denoiser, base, threes_and_eights, run, 120, 100)
    with torch.inference_mode():
        noise, generated, real = (
            extractor(images).double().numpy()
            for images in (torch.rand(120, 1, 8, 8) * 2 - 1, made, threes_and_eights.samples)
        )
    scale = (real**2).mean() ** 0.5
    generator = run.generator("kernel")
    values = kernel_distances(generated / scale, real / scale, 100, 60, generator)
    assert figure.value == pytest.approx(np.mean(values), rel=1e-6)
    assert figure.spread == pytest.approx(np.std(values, ddof=1), rel=1e-6)
    assert figure.spread > 0  # subsets differ, though 120 images are fewer than 1,000
    far = np.mean(kernel_distances(noise / scale, real / scale, 20, 60, generator))
    assert figure.value < far / 10


def test_a_task_of_three_images_has_no_subsets(base, threes_and_eights):
    few = attrs.evolve(
        threes_and_eights,
        samples=threes_and_eights.samples[:3],
        conditioning={"class_labels": torch.tensor([3, 8, 8])},
    )
    with pytest.raises(DataError, match="3 images"):
        Kernel(samples=4).measure(base.denoiser, base, few, moediff.Run())


# What the two distances share.


class Counting(nn.Module):
    """A denoiser that counts its calls, and fails at one of them if asked to."""

    def __init__(self, inner: nn.Module, fails_at: int | None = None) -> None:
        super().__init__()
        self.inner, self.fails_at, self.calls = inner, fails_at, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return self.inner(*args, **kwargs)


DDIM2 = moediff.Sampling("ddim", 2)


def figures(denoiser, base, task, run, metric=None) -> moediff.roles.Measurement:
    return (metric or Frechet(samples=6, batch=2)).measure(denoiser, base, task, run)


def test_two_distances_in_one_folder_generate_once(base, threes_and_eights, tmp_path):
    kernel = Kernel(samples=6, batch=2, subsets=3)
    alone = figures(base.denoiser, base, threes_and_eights, moediff.Run(DDIM2), kernel)
    denoiser = Counting(base.denoiser)
    run = moediff.Run(sampling=DDIM2, cache=tmp_path)
    figures(denoiser, base, threes_and_eights, run)
    assert denoiser.calls == 6  # three batches, two steps
    assert run.ledger["generated-features"].samples == 12
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    again = moediff.Run(sampling=DDIM2, cache=tmp_path)
    assert figures(denoiser, base, threes_and_eights, again, kernel) == alone
    assert denoiser.calls == 6
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("change", ["weights", "sampling", "samples", "classes", "real", "batch"])
def test_nothing_old_is_used_for_something_new(base, threes_and_eights, tmp_path, change):
    def measured(cache: Path | None) -> tuple[float, int]:
        denoiser = Counting(inner)
        run = moediff.Run(sampling=sampling, cache=cache)
        return figures(denoiser, base, task, run, metric).value, denoiser.calls

    inner, task, sampling = digits.load_base()[0], threes_and_eights, DDIM2
    metric = Frechet(samples=6, batch=2)
    before, _ = measured(tmp_path)
    match change:
        case "weights":
            with torch.no_grad():
                inner.conv_out.weight[0, 0, 0, 0] += 0.5
        case "sampling":
            sampling = attrs.evolve(DDIM2, seed=1)
        case "samples":
            metric = attrs.evolve(metric, samples=8)
        case "classes":
            task = threes_and_eights.subset([3])
        case "real":
            task = attrs.evolve(task, samples=-task.samples)
        case "batch":
            metric = attrs.evolve(metric, batch=3)
    value, calls = measured(tmp_path)
    assert value == measured(None)[0]
    if change != "batch":
        assert value != before
    assert (calls == 0) == (change == "real")  # which changes nothing about what is generated


def test_mixtures_that_route_otherwise_are_told_apart(base, threes_and_eights, tmp_path):
    dropped = Blueprint(drop=(base.anatomy.layers[-1].name,))
    run = moediff.Run(sampling=DDIM2, cache=tmp_path)
    found = []
    for cuts in ((0, 400, 1000), (0, 900, 1000)):
        plan = Plan(Intervals(cuts), (Blueprint(), dropped), {"*": (0, 1)})
        mixture = ExpertMixture.from_experts(base.split(plan.intervals), plan)
        value = figures(mixture, base, threes_and_eights, run).value
        assert value == figures(mixture, base, threes_and_eights, moediff.Run(DDIM2)).value
        found.append(value)
    assert found[0] != found[1]


def test_what_a_masked_denoiser_makes_is_not_kept(base, threes_and_eights, tmp_path):
    run = moediff.Run(sampling=DDIM2, cache=tmp_path)
    whole = figures(base.denoiser, base, threes_and_eights, run).value
    handle = base.denoiser.conv_out.register_forward_pre_hook(lambda module, args: (0 * args[0],))
    try:
        masked = figures(base.denoiser, base, threes_and_eights, run).value
        assert masked == figures(base.denoiser, base, threes_and_eights, moediff.Run(DDIM2)).value
    finally:
        handle.remove()
    assert masked != whole
    assert figures(base.denoiser, base, threes_and_eights, run).value == whole


def test_a_killed_measurement_goes_on_after_its_last_batch(base, threes_and_eights, tmp_path):
    run = moediff.Run(sampling=DDIM2, cache=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        figures(Counting(base.denoiser, fails_at=6), base, threes_and_eights, run)
    denoiser = Counting(base.denoiser)
    value = figures(denoiser, base, threes_and_eights, moediff.Run(DDIM2, cache=tmp_path)).value
    assert denoiser.calls == 2
    assert value == figures(base.denoiser, base, threes_and_eights, moediff.Run(DDIM2)).value


# Memory.


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_by_hand(device):
    """Floats of (4, 100) -> (4, 1000) -> (4, 10); the input and the weights were there before."""
    wide, narrow = 4 * 4 * 1000, 4 * 4 * 10
    first, second = nn.Linear(100, 1000, device=device), nn.Linear(1000, 10, device=device)
    inputs = torch.randn(4, 100, device=device)
    with torch.inference_mode():
        # Before and after a ReLU are alive together, unless it works in place.
        assert live_peak(lambda: nn.Sequential(first, nn.ReLU(), second)(inputs)) == 2 * wide
        in_place = nn.Sequential(first, nn.ReLU(inplace=True), second)
        assert live_peak(lambda: in_place(inputs)) == wide + narrow
        # Views take nothing, neither of the input nor of a result.
        assert live_peak(lambda: first(inputs).view(-1)[:10].unsqueeze(0)) == wide
        assert live_peak(lambda: inputs.t().reshape(100, 4)) == 0
        # What is kept adds up; what is let go makes room.
        assert live_peak(lambda: [first(inputs) for _ in range(5)]) == 5 * wide

        def one_after_another() -> None:
            for _ in range(5):
                first(inputs)

        assert live_peak(one_after_another) == wide


def test_shared_weights_are_counted_once():
    layer = nn.Linear(10, 10)
    assert weight_bytes(nn.ModuleList([layer, layer])) == 4 * 110
    assert weight_bytes(nn.BatchNorm1d(10)) == 4 * (4 * 10) + 8  # buffers; a count of batches


def bytes_of(denoiser: nn.Module, subject: moediff.Subject, task: moediff.Task) -> torch.Tensor:
    run = moediff.Run(sampling=moediff.Sampling("ddim", 4))
    figure = Memory().measure(denoiser, subject, task, run)
    used = run.records["free/memory"]
    assert (figure.name, figure.unit, figure.samples) == ("memory", "x base", 4)
    assert figure.value == pytest.approx(float(used[0]) / float(used[1]), rel=1e-6)
    return used


def test_the_base_beside_itself_takes_as_much(subject, task):
    ours, base = bytes_of(subject.denoiser, subject, task).tolist()
    assert ours == base > weight_bytes(subject.denoiser) + 4 * 4 * 3 * 8 * 8


def test_a_mixture_takes_all_its_weights_and_its_greediest_call(subject, task):
    small = Blueprint(drop=tuple(subject.anatomy.layer_units))
    plan = Plan(Intervals.uniform(1000, 2), (small, Blueprint()), {"*": (0, 1)})
    mixture = ExpertMixture.from_experts(subject.split(plan.intervals), plan)
    ours, base = bytes_of(mixture, subject, task).tolist()
    activations = base - weight_bytes(subject.denoiser)
    assert ours == weight_bytes(mixture) + activations  # the second expert is the whole base
    alone, _ = bytes_of(mixture.experts[0], subject, task).tolist()
    assert alone - weight_bytes(mixture.experts[0]) < activations


def test_memory_on_meta_is_the_same_without_computing(scheduler):
    """So the figure at a paper's size takes seconds."""
    unet = tiny_unet("class-conditional")
    task = tiny_task(labelled=True)
    subject = moediff.installed().dissect(unet, scheduler)
    real = bytes_of(unet, subject, task)
    with torch.device("meta"):
        shapes = type(unet).from_config(unet.config).eval()
    other = moediff.installed().dissect(shapes, scheduler)
    assert torch.equal(bytes_of(shapes, other, task), real)


# The loss.


def test_the_loss_is_the_same_mean_whatever_the_batch(subject: moediff.Subject):
    """Every timestep of an even grid counts once, with images and noise that the run draws."""
    task, seen = tiny_task(), []

    class Zero(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **_: Any) -> Any:
            seen.append(timestep)
            return (torch.zeros_like(sample),)

    found = Loss(samples=500, batch=64).measure(Zero(), subject, task, moediff.Run())
    assert torch.cat(seen).sort().values.tolist() == list(range(0, 1000, 2))
    # The mean square of standard normal noise over 500 x 192 numbers.
    assert found.value == pytest.approx(1, abs=4 * (2 / (500 * 192)) ** 0.5)
    assert found.name == "loss"
    assert found.spread == pytest.approx((2 / (500 * 192)) ** 0.5, rel=0.8)


def test_the_loss_compares_models_on_the_same_draws(subject: moediff.Subject):
    values = [
        Loss(samples=20, batch=8).measure(model, subject, tiny_task(), moediff.Run(seed=seed)).value
        for model in (subject.denoiser, tiny_unet(seed=1))
        for seed in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]
    assert values[3] == values[4]
    assert values[0] != values[3]


def test_a_mixture_in_half_precision_is_measured_beside_its_base(base, threes_and_eights):
    plan = Plan(Intervals((0, 500, 1000)), [Blueprint(), Blueprint()])
    half = ExpertMixture.from_experts([base, base], plan).half()
    run = moediff.Run(sampling=moediff.Sampling("ddim", 3))
    whole = Frechet("digits", samples=30).measure(base.denoiser, base, threes_and_eights, run)
    found = Frechet("digits", samples=30).measure(half, base, threes_and_eights, run)
    assert found.value == pytest.approx(whole.value, rel=0.05)
    assert 0.4 < Memory(batch=1).measure(half, base, threes_and_eights, run).value < 0.6
    assert Latency(batch=1, pairs=3).measure(half, base, threes_and_eights, run).value > 0
