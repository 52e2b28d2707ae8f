"""Clustering by the size of the losses: the formula, the cuts, resuming."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

import moediff
from moediff import Anatomy, Intervals, Run, Subject
from moediff.errors import DataError, OptionError
from moediff_plugins.clusterers.cuts import best_cuts
from moediff_plugins.clusterers.loss_similarity import LossSimilarity

QUICK = LossSimilarity(stride=125, images=6, batch=4)


class Levels(nn.Module):
    """A denoiser without skill: at `bounds` the size of what it predicts changes."""

    def __init__(self, bounds: tuple[int, ...], sizes: tuple[float, ...]) -> None:
        super().__init__()
        self.bounds = torch.tensor(bounds)
        self.sizes = nn.Parameter(torch.tensor(sizes, dtype=torch.float32))
        self.config = {"sample_size": 8}

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        size = self.sizes[torch.bucketize(timestep, self.bounds, right=True)]
        return (size.view(-1, 1, 1, 1).expand_as(sample),)


class Interrupted(Run):
    """A run that is killed after a few rounds of its first long loop."""

    def progress(
        self, items: Iterable[Any] | None, description: str, total: int | None = None
    ) -> Iterator[Any]:
        for index, item in enumerate(items or ()):
            if index == 3:
                raise KeyboardInterrupt
            yield item


def leveled(bounds: tuple[int, ...], *sizes: float) -> Subject:
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    return Subject(Levels(bounds, sizes), scheduler, Anatomy(()), (0, 1000))


def staged(run: Run, subject: Subject, task: moediff.Task) -> Intervals:
    return run.stage(
        "intervals",
        [QUICK],
        lambda: QUICK.cluster(subject, task, run),
        pack=lambda intervals: ({}, list(intervals.cuts)),
        unpack=lambda tensors, cuts: Intervals(cuts),
    )


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize("cut", [200, 700])
def test_the_cut_is_where_the_losses_change(task: moediff.Task, cut: int, scale: str) -> None:
    options = {"stride": 100, "images": 16, "scale": scale}
    clusterer = moediff.installed().create("clusterers", "loss-similarity", options)
    run = Run(experts=2)
    assert clusterer.cluster(leveled((cut,), 0, 5), task, run).cuts == (0, cut, 1000)
    assert run.records["free/timesteps"].tolist() == list(range(50, 1000, 100))
    # The noise has variance 1, and a constant c misses it by 1 + c^2.
    wanted = torch.tensor([1.0 if t < cut else 26.0 for t in range(50, 1000, 100)])
    torch.testing.assert_close(
        run.records["free/losses"], wanted.double(), rtol=0.1, atol=0, check_dtype=False
    )


def test_the_logarithm_compares_ratios(task: moediff.Task) -> None:
    # Losses of 1, 17 and 1,601: equal steps for ratios, one large step for differences.
    subject = leveled((300, 600), 0, 4, 40)
    clusterer = LossSimilarity(stride=100, images=16)
    assert clusterer.cluster(subject, task, Run(experts=3)).cuts == (0, 300, 600, 1000)
    run = Run(experts=2)
    linear = attrs.evolve(clusterer, scale="linear").cluster(subject, task, run)
    assert linear.cuts == (0, 600, 1000)


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_the_similarity_is_the_closeness_of_the_losses(
    subject: Subject, task: moediff.Task, scale: str
) -> None:
    run = Run(experts=3)
    options = {"stride": 125, "images": 6, "batch": 4, "scale": scale}
    clusterer = moediff.installed().create("clusterers", "loss-similarity", options)
    intervals = clusterer.cluster(subject, task, run)
    losses = run.records["free/losses"]
    values = losses.log() if scale == "log" else losses
    spread = values.max() - values.min()
    similarity = run.records["free/similarity"]
    for j in range(8):
        for k in range(8):
            wanted = 1 - (values[j] - values[k]).abs() / spread
            assert float(similarity[j, k]) == pytest.approx(float(wanted), abs=1e-12)
    cells = Intervals.uniform(1000, 8)
    found = best_cuts(similarity.numpy(), 3)[0]
    assert intervals.cuts == tuple(cells.cuts[cut] for cut in found)
    assert run.records["free/objective"].shape == (7,)


def test_the_batch_size_changes_the_draw_but_not_the_expectation(
    subject: Subject, task: moediff.Task
) -> None:
    losses = []
    for batch in (64, 7):
        run = Run(experts=2)
        LossSimilarity(stride=500, images=64, batch=batch).cluster(subject, task, run)
        losses.append(run.records["free/losses"])
    torch.testing.assert_close(*losses, rtol=0.1, atol=0)


def test_it_resumes_at_the_timestep_where_it_was_killed(
    subject: Subject, task: moediff.Task, tmp_path: Path
) -> None:
    whole = Run(experts=2)
    wanted = staged(whole, subject, task)
    with pytest.raises(KeyboardInterrupt):
        staged(Interrupted(experts=2, cache=tmp_path), subject, task)
    resumed = Run(experts=2, cache=tmp_path)
    assert staged(resumed, subject, task) == wanted
    assert set(resumed.records) == set(whole.records)
    assert all(torch.equal(resumed.records[key], value) for key, value in whole.records.items())
    assert whole.ledger["intervals"].samples == 8 * 6
    assert resumed.ledger["intervals"].samples == 8 * 6


def test_equal_losses_are_all_alike(task: moediff.Task) -> None:
    class Perfect(Levels):
        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True
        ) -> tuple[torch.Tensor]:
            return (torch.full_like(sample, 1e12),)  # the noise is lost in rounding

    subject = attrs.evolve(leveled((1,), 0, 0), denoiser=Perfect((1,), (0, 0)))
    run = Run(experts=2)
    intervals = LossSimilarity(stride=250, images=2, scale="linear").cluster(subject, task, run)
    assert len(intervals) == 2
    assert torch.equal(run.records["free/similarity"], torch.ones(4, 4, dtype=torch.float64))


@pytest.mark.parametrize("size", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_are_refused(task: moediff.Task, size: float) -> None:
    with pytest.raises(DataError, match=r"loss at timestep 562 is (nan|inf)"):
        QUICK.cluster(leveled((500,), 0, size), task, Run(experts=2))


def test_too_few_cells_name_the_stride_that_would_do(subject: Subject, task: moediff.Task) -> None:
    with pytest.raises(OptionError, match=r"stride: got 200, which makes 5 cells.*at most 142"):
        LossSimilarity(stride=200).cluster(subject, task, Run(experts=8))


@pytest.mark.parametrize(
    "options", [{"stride": 0}, {"images": 0}, {"batch": 0}, {"scale": "square"}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"loss-similarity: .*{next(iter(options))}"):
        moediff.installed().create("clusterers", "loss-similarity", options)
