"""Every scorer against its formula, and the promises that all of them keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from diffusers import DDPMScheduler

import moediff
from moediff import Anatomy, Run, Sampling, Scores, Subject
from moediff.errors import AnatomyError, OptionError
from moediff.masking import masked_channels
from moediff.sampling import generate, initial_noise
from moediff.storage import read_packed
from moediff_plugins.scorers.ablation_l1 import AblationL1
from moediff_plugins.scorers.ablation_l1_sketch import AblationL1Sketch
from moediff_plugins.scorers.channels import channel_counts, rank_stability
from moediff_plugins.scorers.gradient import Gradient
from moediff_plugins.scorers.magnitude import Magnitude
from moediff_plugins.scorers.random import Random
from moediff_plugins.scorers.taylor import Taylor
from tests.conftest import tiny_task, tiny_unet

# Some of diffusers' schedulers hand torch tensors to numpy 2 in a way that it will drop.
DIFFUSERS = "ignore:__array__ implementation:DeprecationWarning"
QUICK = {
    "ablation-l1": AblationL1(images=2, batch=64),
    "ablation-l1-sketch": AblationL1Sketch(images=2, projections=2),
    "gradient": Gradient(samples=6, batch=4),
    "magnitude": Magnitude(),
    "random": Random(),
    "taylor": Taylor(samples=6, batch=4),
}


def part(subject: Subject, *layers: int, double: bool = False) -> Subject:
    """The subject with only some of its layers in view, which keeps exact loops short."""
    denoiser = subject.denoiser.double() if double else subject.denoiser
    chosen = tuple(subject.anatomy.layers[index] for index in layers)
    return attrs.evolve(subject, denoiser=denoiser, anatomy=Anatomy(chosen))


def one_at_a_time(
    subject: Subject, task: moediff.Task, sampling: Sampling, images: int
) -> tuple[dict[str, list[float]], float]:
    """Eq. 1 as a plain loop: width name -> one distance per channel; and the images' scale."""
    dtype = next(subject.denoiser.parameters()).dtype
    noise = initial_noise(sampling.seeds(images), subject.shape).to(dtype)
    conditioning, null = task.prompts(images)

    @torch.no_grad()
    def images_now() -> torch.Tensor:
        seeds = sampling.seeds(images)
        return generate(
            subject.denoiser, subject.scheduler, sampling, noise, conditioning, null, seeds
        ).double()

    intact = images_now()
    distances: dict[str, list[float]] = {}
    for name, width in subject.anatomy.widths.items():
        for channel in range(width.count * width.size):
            mask = torch.ones(width.count * width.size)
            mask[channel] = 0
            with masked_channels(subject.denoiser, width, mask):
                gap = (images_now() - intact).abs().mean().item()
            distances.setdefault(name, []).append(gap)
    return distances, intact.abs().mean().item()


def expected(anatomy: Anatomy, distances: dict[str, list[float]], aggregate: str) -> list[float]:
    """Unit scores from channel distances, unit by unit."""

    def reduce(values: list[float]) -> float:
        return sum(values) / (len(values) if aggregate == "mean" else 1)

    scores = []
    for unit in anatomy.units:
        if unit.width is None:
            widths = anatomy.layer(unit.layer).widths
            scores.append(reduce([d for width in widths for d in distances[width.name]]))
        else:
            size = anatomy.widths[unit.width].size
            start = unit.position * size
            scores.append(reduce(distances[unit.width][start : start + size]))
    return scores


class Interrupted(Run):
    """A run that is killed after a few rounds of its first long loop."""

    rounds = 3

    def progress(
        self, items: Iterable[Any] | None, description: str, total: int | None = None
    ) -> Iterator[Any]:
        for index, item in enumerate(items or ()):
            if index == self.rounds:
                raise KeyboardInterrupt
            yield item


def staged(run: Run, scorer: Any, subject: Subject, task: moediff.Task) -> Scores:
    """Score the way the engine does, in a stage with a place for unfinished work."""
    return run.stage(
        "scores",
        [scorer],
        lambda: scorer.score(subject, task, run),
        pack=lambda scores: ({"values": scores.values}, scores.comparable),
        unpack=lambda tensors, comparable: Scores(tensors["values"], comparable),
    )


# AblationL1


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_ablation_of_one_forward_is_eq_1_for_every_channel_alone(
    subject: Subject, task: moediff.Task, aggregate: str
) -> None:
    subject = part(subject, 2, 5)  # a ResBlock with and one without attention
    sampling = Sampling(steps=1)
    scores = AblationL1(aggregate=aggregate, images=3, batch=16).score(  # type: ignore[arg-type]
        subject, task, Run(sampling=sampling)
    )
    distances, scale = one_at_a_time(subject, task, sampling, images=3)
    wanted = torch.tensor(expected(subject.anatomy, distances, aggregate), dtype=torch.float64)
    assert scores.comparable
    assert wanted.min() > 1e-6  # every ablation shows
    # A score is a small difference of images: rounding goes by the images' scale, not by its own.
    channels = max(len(row) for row in distances.values()) if aggregate == "sum" else 1
    assert (scores.values - wanted).abs().max() < 1e-5 * scale / channels


@pytest.mark.filterwarnings(DIFFUSERS)
@pytest.mark.parametrize("scheduler_name", ["ddim", "ddpm", "dpmsolver++"])
def test_ablation_of_whole_samplings_in_float64(
    scheduler: DDPMScheduler, scheduler_name: str
) -> None:
    task = moediff.Task(
        tiny_task().samples,
        {"class_labels": torch.arange(32) % 3},
        {"class_labels": torch.tensor([3])},
    )
    subject = moediff.installed().dissect(tiny_unet("class-conditional"), scheduler)
    subject = part(subject, 1, double=True)
    sampling = Sampling(scheduler=scheduler_name, steps=4, guidance=2.0, seed=5)
    scores = AblationL1(images=2, batch=14).score(subject, task, Run(sampling=sampling))
    distances, _ = one_at_a_time(subject, task, sampling, images=2)
    wanted = torch.tensor(expected(subject.anatomy, distances, "sum"), dtype=torch.float64)
    torch.testing.assert_close(scores.values, wanted, rtol=1e-9, atol=0)


def test_ablation_of_units_removes_each_as_a_whole(subject: Subject, task: moediff.Task) -> None:
    subject = part(subject, 2, double=True)
    sampling = Sampling(steps=2)
    run = Run(sampling=sampling)
    scores = AblationL1(grain="unit", images=2, batch=6).score(subject, task, run)
    noise = initial_noise(sampling.seeds(2), subject.shape).double()

    @torch.no_grad()
    def images_of(denoiser: torch.nn.Module) -> torch.Tensor:
        return generate(denoiser, subject.scheduler, sampling, noise, {}, {}, sampling.seeds(2))

    whole = images_of(subject.denoiser)
    for index, unit in enumerate(subject.anatomy.units):
        if unit.width is None:
            blueprint = moediff.Blueprint(drop=(unit.layer,))
        else:
            count = subject.anatomy.widths[unit.width].count
            rest = tuple(k for k in range(count) if k != unit.position)
            blueprint = moediff.Blueprint(keep={unit.width: rest})
        smaller = moediff.cut(subject.denoiser, subject.anatomy, blueprint)
        wanted = (images_of(smaller) - whole).abs().mean().item()
        assert scores.values[index].item() == pytest.approx(wanted, rel=1e-8), unit.name


def test_ablation_does_not_depend_on_the_batch(subject: Subject, task: moediff.Task) -> None:
    subject = part(subject, 4, double=True)
    run = Run(sampling=Sampling(steps=2))
    small, large = (
        AblationL1(images=2, batch=batch).score(subject, task, run).values for batch in (2, 1000)
    )
    torch.testing.assert_close(small, large, rtol=1e-10, atol=0)


@pytest.mark.parametrize("grain", ["channel", "unit"])
def test_ablation_resumes_where_it_was_killed(
    subject: Subject, task: moediff.Task, tmp_path: Path, grain: str
) -> None:
    subject = part(subject, 2, 4)
    scorer = AblationL1(grain=grain, images=2, batch=6)  # type: ignore[arg-type]
    sampling = Sampling(steps=2)
    whole = Run(sampling=sampling)
    wanted = staged(whole, scorer, subject, task)

    with pytest.raises(KeyboardInterrupt):
        staged(Interrupted(sampling=sampling, cache=tmp_path), scorer, subject, task)
    resumed, rows = Run(sampling=sampling, cache=tmp_path), []
    subject.denoiser.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    found = staged(resumed, scorer, subject, task)
    assert torch.equal(found.values, wanted.values)
    # Three batches of 3 ablations x 2 images x 2 steps were not done again, but they were spent.
    assert sum(rows) == whole.ledger["scores"].samples - 3 * 12
    assert resumed.ledger["scores"].samples == whole.ledger["scores"].samples
    assert not list(tmp_path.glob("*.checkpoint"))


@pytest.mark.filterwarnings(DIFFUSERS)
def test_ablation_states_its_cost_before_it_starts(
    subject: Subject, task: moediff.Task, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = part(subject, 0)
    run = Run(sampling=Sampling(scheduler="heun", steps=3), verbose=True)
    AblationL1(images=2, batch=8).score(subject, task, run)
    (channels,) = (width.count * width.size for width in subject.anatomy.widths.values())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ablation")]
    plan, estimate = said
    assert f"{channels} ablations x 2 images of 5 denoiser calls" in plan
    assert "s for all batches" in estimate


def test_ablation_of_some_channels_is_the_same_for_them(
    subject: Subject, task: moediff.Task
) -> None:
    subject = part(subject, 2, 4, double=True)
    sampling = Sampling(steps=2)
    full, some = Run(sampling=sampling), Run(sampling=sampling)
    AblationL1(images=2, batch=64).score(subject, task, full)
    scores = AblationL1(images=2, batch=64, channels=3).score(subject, task, some)
    every, found = full.records["free/channels"], some.records["free/channels"]
    scored = ~found.isnan()
    torch.testing.assert_close(found[scored], every[scored], rtol=1e-9, atol=0)
    start = 0
    for width in subject.anatomy.widths.values():
        own = found[start : start + width.count * width.size]
        assert (~own.isnan()).sum() == 3
        # The others stand at the mean of their unit or, where that has none, of their width.
        grid = own.view(width.count, width.size)
        means = [float(row.nanmean()) for row in grid]
        wanted = [width.size * (own.nanmean().item() if m != m else m) for m in means]
        values = scores.values[subject.anatomy.spans[width.name]].tolist()
        assert values == pytest.approx(wanted, rel=1e-9)
        start += len(own)
    assert -1 <= some.records["free/rank-stability"].item() <= 1
    assert "free/rank-stability" not in full.records


def test_rank_stability_tells_signal_from_noise(subject: Subject) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = channel_counts(subject.anatomy)
    noise = torch.rand(sum(counts), generator=generator, dtype=torch.float64)
    rising = torch.repeat_interleave(
        torch.arange(len(counts), dtype=torch.float64), torch.tensor(counts)
    )
    assert rank_stability(subject.anatomy, rising + 0.1 * noise, generator) > 0.99
    assert abs(rank_stability(subject.anatomy, noise, generator)) < 0.7
    assert math.isnan(
        rank_stability(Anatomy(subject.anatomy.layers[:1]), noise[: counts[0]], generator)
    )


def test_ablation_by_interval_removes_a_channel_at_its_timesteps_only(
    subject: Subject, task: moediff.Task
) -> None:
    subject = part(subject, 2, double=True)
    run = Run(sampling=Sampling(steps=4))  # timesteps 0, 250, 500 and 750
    scorer = AblationL1(images=1, by_interval=True)
    assert scorer.needs == {"intervals"}
    assert AblationL1().needs == frozenset()

    def scores(*interval: int) -> torch.Tensor:
        return scorer.score(attrs.evolve(subject, interval=interval), task, run).values

    assert scores(251, 500).max() < 1e-12  # rounding alone, which the batch decides
    early, late, whole = scores(400, 1000), scores(0, 400), scores(0, 1000)
    assert not torch.equal(early, late)
    width = next(iter(subject.anatomy.widths.values()))
    channels = torch.ones(width.count * width.size).double()
    channels[0] = 0

    def call(sample: torch.Tensor, timestep: Any, **words: Any) -> Any:
        if timestep < 400:
            return subject.denoiser(sample, timestep, **words)
        with masked_channels(subject.denoiser, width, channels) as denoiser:
            return denoiser(sample, timestep, **words)

    seeds = run.sampling.seeds(1)
    noise = initial_noise(seeds, subject.shape).double()
    with torch.no_grad():
        made = [
            generate(d, subject.scheduler, run.sampling, noise, {}, {}, seeds)
            for d in (call, subject.denoiser)
        ]
    records = Run(sampling=run.sampling)
    scorer.score(attrs.evolve(subject, interval=(400, 1000)), task, records)
    wanted = (made[0] - made[1]).abs().mean().item()
    assert records.records["free/channels"][0].item() == pytest.approx(wanted, rel=1e-9)
    assert whole.min() > 0


def test_scores_by_interval_reach_every_expert(
    subject: Subject, task: moediff.Task, tmp_path: Path
) -> None:
    recipe = moediff.load_recipe(
        "moedm",
        scorer=AblationL1(images=1, channels=1, by_interval=True),
        pruner="structural",
        budget=0.8,
        recover=None,
        sampling=Sampling(steps=2),
    )
    mixture = moediff.build_experts(
        subject.denoiser, subject.scheduler, task, recipe, cache=tmp_path
    )
    first, second = (read_packed(path)[0]["values"] for path in tmp_path.glob("scores-*"))
    assert not torch.allclose(first, second, rtol=0.1)
    assert len(mixture.experts) == 2


def test_ablation_counts_every_sample_it_passes(subject: Subject, task: moediff.Task) -> None:
    subject = part(subject, 2)
    rows = []
    handle = subject.denoiser.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    run = Run(sampling=Sampling(steps=2))
    run.stage(
        "scores", [], lambda: AblationL1(images=2, batch=10).score(subject, task, run),
        pack=lambda _: ({}, None), unpack=lambda _, __: None,
    )  # fmt: skip
    handle.remove()
    assert run.ledger["scores"].samples == sum(rows)
    assert max(rows) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 8, "batch": 7}, "batch: got 7 rows; allowed is 8"),
        ({"images": 0}, "images"),
        ({"images": 2.5}, "images"),
        ({"batch": 0}, "batch"),
        ({"grain": "layer"}, "grain"),
        ({"aggregate": "max"}, "aggregate"),
        ({"channels": 0}, "channels"),
        ({"channels": 2, "grain": "unit"}, "channels: got a number of channels"),
    ],
)
def test_ablation_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        moediff.installed().create("scorers", "ablation-l1", options)


def test_ablation_with_guidance_needs_a_null(subject: Subject, task: moediff.Task) -> None:
    with pytest.raises(OptionError, match="guidance"):
        QUICK["ablation-l1"].score(subject, task, Run(sampling=Sampling(steps=1, guidance=3)))


# Magnitude


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_magnitude_is_the_norm_per_weight(subject: Subject, task: moediff.Task, p: float) -> None:
    scores = Magnitude(p=p).score(subject, task, Run()).values
    assert not Magnitude(p=p).score(subject, task, Run()).comparable

    def norm(*weights: torch.Tensor) -> float:
        flat = torch.cat([weight.detach().double().flatten() for weight in weights]).abs()
        return float(flat.pow(p).mean().pow(1 / p))

    get = subject.denoiser.get_submodule
    for value, unit in zip(scores.tolist(), subject.anatomy.units, strict=True):
        if unit.width is None:
            modules = [m for path in subject.anatomy.layer(unit.layer).modules
                       for m in get(path).modules()]  # fmt: skip
            kinds = (torch.nn.Conv2d, torch.nn.Linear)
            wanted = norm(*(m.weight for m in modules if isinstance(m, kinds)))
        else:
            width = subject.anatomy.widths[unit.width]
            rows = slice(unit.position * width.size, (unit.position + 1) * width.size)
            path = unit.width.rpartition(".")[0]
            names = ("conv1",) if width.kind == "groups" else ("to_q", "to_k", "to_v")
            wanted = norm(*(get(f"{path}.{name}").weight[rows] for name in names))
        assert value == pytest.approx(wanted, rel=1e-12), unit.name


def test_magnitude_finds_the_unit_that_was_scaled(any_subject: Subject, task: moediff.Task) -> None:
    for name, width in any_subject.anatomy.widths.items():
        position = width.count - 1
        rows = slice(position * width.size, (position + 1) * width.size)
        maker = "conv1" if width.kind == "groups" else "to_q"
        with torch.no_grad():
            path = f"{name.rpartition('.')[0]}.{maker}"
            any_subject.denoiser.get_submodule(path).weight[rows] *= 100
    values = Magnitude().score(any_subject, task, Run()).values
    for name, width in any_subject.anatomy.widths.items():
        assert values[any_subject.anatomy.spans[name]].argmax() == width.count - 1, name


def test_magnitude_ignores_biases_and_normalisation(subject: Subject, task: moediff.Task) -> None:
    before = Magnitude().score(subject, task, Run()).values
    with torch.no_grad():
        for name, parameter in subject.denoiser.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 5
    assert torch.equal(Magnitude().score(subject, task, Run()).values, before)


def test_magnitude_reads_every_block_of_a_doubled_projection(
    subject: Subject, task: moediff.Task
) -> None:
    # One linear module makes a scale and a shift of 2 units x 3 channels: rows of unit 1 are
    # 3..5 and 9..11.
    name = subject.anatomy.layers[0].name
    linear = torch.nn.Linear(2, 12)
    subject.denoiser.get_submodule(name).extra = linear
    with torch.no_grad():
        linear.weight[:] = torch.arange(12.0)[:, None]
    places = (moediff.Slice(f"{name}.extra", "out", blocks=2),)
    width = moediff.Width(f"{name}.extra", "hidden", 2, 3, f"{name}.conv2", 1, places)
    layer = attrs.evolve(subject.anatomy.layers[0], widths=(width,), droppable=False)
    values = Magnitude().score(attrs.evolve(subject, anatomy=Anatomy((layer,))), task, Run())
    assert values.values.tolist() == [pytest.approx(4.0), pytest.approx(7.0)]


def test_magnitude_refuses_a_width_that_no_weight_produces(
    subject: Subject, task: moediff.Task
) -> None:
    layer = subject.anatomy.layers[0]
    width = attrs.evolve(layer.widths[0], slices=(moediff.Slice(f"{layer.name}.norm2", "out"),))
    anatomy = Anatomy((attrs.evolve(layer, widths=(width,)),))
    with pytest.raises(AnatomyError, match="no weights to score"):
        Magnitude().score(attrs.evolve(subject, anatomy=anatomy), task, Run())


@pytest.mark.parametrize("p", [0, -1, float("inf"), float("nan"), "two"])
def test_magnitude_refuses_bad_norms(p: Any) -> None:
    with pytest.raises(OptionError, match="magnitude"):
        moediff.installed().create("scorers", "magnitude", {"p": p})


# Random


def test_random_depends_on_the_seed_only(subject: Subject, task: moediff.Task) -> None:
    first = Random().score(subject, task, Run(seed=1)).values
    torch.rand(3)
    assert torch.equal(Random().score(subject, task, Run(seed=1)).values, first)
    assert not torch.equal(Random().score(subject, task, Run(seed=2)).values, first)
    assert len(set(first.tolist())) == len(subject.anatomy.units)


# All of them


@pytest.mark.parametrize("name", sorted(QUICK))
def test_scorers_leave_everything_as_found(
    any_subject: Subject, scheduler: DDPMScheduler, name: str
) -> None:
    denoiser = any_subject.denoiser
    denoiser.train()
    weights = {key: value.clone() for key, value in denoiser.state_dict().items()}
    state = torch.get_rng_state()
    task = tiny_task(labelled=denoiser.class_embedding is not None)
    scores = QUICK[name].score(any_subject, task, Run(sampling=Sampling(steps=1)))
    assert scores.values.shape == (len(any_subject.anatomy.units),)
    assert torch.isfinite(scores.values).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[key]) for key, value in denoiser.state_dict().items())
    assert denoiser.training
    for module in denoiser.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.grad is None and p.requires_grad for p in denoiser.parameters())


@pytest.mark.parametrize("name", sorted(QUICK))
def test_scorers_are_found_by_name(name: str) -> None:
    assert type(moediff.installed().create("scorers", name, {})) is type(QUICK[name])
