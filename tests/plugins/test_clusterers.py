"""Cut points against brute force, and the alignment of gradients end to end."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import moediff
from moediff import Anatomy, Intervals, Run, Subject
from moediff.denoising import corrupt
from moediff.errors import DataError, OptionError
from moediff_plugins import digits
from moediff_plugins.clusterers.alignment import Alignment
from moediff_plugins.clusterers.cuts import (
    best_cuts,
    held_out,
    objective,
    single_cut_objective,
)
from moediff_plugins.clusterers.loss_similarity import LossSimilarity
from moediff_plugins.clusterers.uniform import Uniform
from moediff_plugins.reports.plots import alignment_plot
from tests.conftest import tiny_task

QUICK = Alignment(stride=125, images=6, batch=4)
RECORDS = {
    "similarity", "timesteps", "objective", "reliability", "held-out-objective", "held-out-fit",
}  # fmt: skip


def term_by_term(similarity: np.ndarray[Any, Any], cuts: Iterable[int]) -> float:
    """DiffPruning, Supp. Eq. 3, term by term."""
    total = 0.0
    for low, high in itertools.pairwise(cuts):
        size = high - low
        pairs = (similarity[j, k] for j in range(low, high) for k in range(low, high))
        total += size / len(similarity) * sum(pairs) / size**2
    return total


def clusterings(cells: int, count: int) -> Iterator[tuple[int, ...]]:
    for inner in itertools.combinations(range(1, cells), count - 1):
        yield (0, *inner, cells)


@st.composite
def symmetric(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    cells = draw(st.integers(4, 7))
    half = draw(arrays(np.float64, (cells, cells), elements=st.floats(-1, 1, width=16)))
    return (half + half.T) / 2


def planted(cells: int, cuts: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A noisy similarity whose timesteps agree inside the clusters only."""
    label = np.searchsorted(cuts[1:-1], np.arange(cells), side="right")
    noise = np.random.default_rng(0).normal(scale=0.2, size=(cells, cells))
    return (label[:, None] == label[None, :]) * 0.5 + (noise + noise.T) / 2


class Switch(nn.Module):
    """A denoiser that uses one weight for timesteps under `cut` and another one above."""

    def __init__(self, cut: int) -> None:
        super().__init__()
        self.cut = cut
        self.weights = nn.Parameter(torch.zeros(2))
        self.unused = nn.Parameter(torch.ones(3))
        self.config = {"sample_size": 8}

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        return (sample * self.weights[(timestep >= self.cut).long()].view(-1, 1, 1, 1),)


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


def staged(run: Run, subject: Subject, task: moediff.Task) -> Intervals:
    return run.stage(
        "intervals",
        [QUICK, run.experts],
        lambda: QUICK.cluster(subject, task, run),
        pack=lambda intervals: ({}, list(intervals.cuts)),
        unpack=lambda tensors, cuts: Intervals(cuts),
    )


# The cut search


@given(symmetric(), st.integers(1, 4))
def test_best_cuts_are_the_best_of_all(similarity: np.ndarray[Any, Any], count: int) -> None:
    cuts, value = best_cuts(similarity, count)
    assert len(cuts) == count + 1
    assert list(cuts) == sorted({*cuts, 0, len(similarity)})
    best = max(term_by_term(similarity, c) for c in clusterings(len(similarity), count))
    assert value == pytest.approx(best, abs=1e-12)
    assert term_by_term(similarity, cuts) == pytest.approx(best, abs=1e-12)
    assert objective(similarity, cuts) == pytest.approx(best, abs=1e-12)


@given(symmetric())
def test_the_curve_is_the_objective_of_every_single_cut(similarity: np.ndarray[Any, Any]) -> None:
    cells = len(similarity)
    wanted = [term_by_term(similarity, (0, k, cells)) for k in range(1, cells)]
    np.testing.assert_allclose(single_cut_objective(similarity), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cuts", [(0, 50), (0, 13, 50), (0, 5, 30, 50), (0, 4, 11, 30, 41, 50)])
def test_best_cuts_find_planted_blocks(cuts: tuple[int, ...]) -> None:
    assert best_cuts(planted(50, cuts), len(cuts) - 1)[0] == cuts


def test_as_many_clusters_as_cells() -> None:
    assert best_cuts(np.eye(4), 4) == ((0, 1, 2, 3, 4), pytest.approx(1.0))


@pytest.mark.parametrize("count", [0, 5])
def test_best_cuts_refuse_an_impossible_count(count: int) -> None:
    with pytest.raises(OptionError, match=rf"count: got {count}; allowed is 1 to 4"):
        best_cuts(np.eye(4), count)


@pytest.mark.parametrize(
    "similarity", [np.ones((3, 4)), np.ones(3), np.full((2, 2), np.nan), np.ones((0, 0))]
)
def test_best_cuts_refuse_what_is_no_similarity(similarity: np.ndarray[Any, Any]) -> None:
    with pytest.raises(DataError, match="square matrix of finite numbers"):
        best_cuts(similarity, 1)


# How many experts


def unit_gradients(
    cuts: tuple[int, ...], noise: float, seed: int = 0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Unit gradients (G, 40) of two halves that share a direction inside every cluster."""
    rng = np.random.default_rng(seed)
    label = np.searchsorted(cuts[1:-1], np.arange(cuts[-1]), side="right")
    shared = rng.normal(size=(len(cuts) - 1, 40))[label]
    halves = shared + noise * rng.normal(size=(2, cuts[-1], 40))
    first, second = halves / np.linalg.norm(halves, axis=-1, keepdims=True)
    return first, second


@given(st.integers(0, 1000), st.floats(0.1, 5))
def test_the_held_out_fit_is_what_interval_means_tell_of_the_other_half(
    seed: int, noise: float
) -> None:
    first, second = unit_gradients((0, 3, 9), noise, seed)
    matrices = (first @ first.T, second @ second.T, first @ second.T)
    objectives, fits = held_out(*matrices, most=4)
    for count in range(1, 5):
        told, values = [], []
        for teller, other in ((first, second), (second, first)):
            cuts, _ = best_cuts(teller @ teller.T, count)
            errors = [
                ((other[k] - teller[low:high].mean(0)) ** 2).sum()
                for low, high in itertools.pairwise(cuts)
                for k in range(low, high)
            ]
            told.append(1 - np.mean(errors))
            values.append(term_by_term(other @ other.T, cuts))
        assert fits[count - 1] == pytest.approx(np.mean(told), abs=1e-9)
        assert objectives[count - 1] == pytest.approx(np.mean(values), abs=1e-9)


@pytest.mark.parametrize("cuts", [(0, 24), (0, 10, 24), (0, 5, 12, 24)])
def test_the_held_out_fit_is_best_at_the_planted_number(cuts: tuple[int, ...]) -> None:
    first, second = unit_gradients(cuts, noise=1.5)
    matrices = (first @ first.T, second @ second.T, first @ second.T)
    objectives, fits = held_out(*matrices, most=8)
    assert 1 + fits.argmax() == len(cuts) - 1
    assert objectives.argmax() == 7  # J rises on and on, so it cannot choose


def test_alignment_records_how_many_experts_the_images_support(
    scheduler: DDPMScheduler, task: moediff.Task
) -> None:
    subject, run = Subject(Switch(600), scheduler, Anatomy(()), (0, 1000)), Run(experts=3)
    Alignment(stride=200, images=16).cluster(subject, task, run)
    fits = run.records["free/held-out-fit"]
    assert fits.shape == run.records["free/held-out-objective"].shape == (5,)
    assert fits[0] < 0.6
    torch.testing.assert_close(fits[1:], torch.ones(4, dtype=torch.float64))


# Alignment


def test_the_plot_shows_the_curves_that_it_is_given() -> None:
    matrix = torch.from_numpy(planted(10, (0, 4, 10)))
    curve, fits = torch.from_numpy(single_cut_objective(matrix.numpy())), torch.rand(8)
    figures = [
        alignment_plot("Alignment", "", matrix, (0, 400, 1000), *curves)
        for curves in ((), (curve,), (curve, fits), (curve, fits.flip(0)), (None, None, matrix[0]))
    ]
    assert len({figure.png for figure in figures}) == 5


@pytest.mark.parametrize("cut", [200, 700])
def test_alignment_finds_where_the_gradients_change(
    scheduler: DDPMScheduler, task: moediff.Task, cut: int
) -> None:
    subject = Subject(Switch(cut), scheduler, Anatomy(()), (0, 1000))
    run = Run(experts=2)
    intervals = Alignment(stride=100, images=16, batch=16).cluster(subject, task, run)
    assert intervals.cuts == (0, cut, 1000)
    assert run.records["free/timesteps"].tolist() == list(range(50, 1000, 100))
    same = torch.tensor([(t < cut) == (s < cut) for t in range(50, 1000, 100)
                         for s in range(50, 1000, 100)])  # fmt: skip
    torch.testing.assert_close(
        run.records["free/similarity"].flatten(), same.double(), rtol=0, atol=1e-12
    )
    assert run.records["free/objective"].argmax() == cut // 100 - 1
    assert run.records["free/objective"].max() == pytest.approx(1.0)


@pytest.mark.parametrize("batch", [8, 2])
def test_similarity_is_the_cosine_of_backpropagated_gradients(
    subject: Subject, task: moediff.Task, batch: int
) -> None:
    run = Run(experts=2, seed=3)
    Alignment(stride=250, images=5, batch=batch, sketch=None).cluster(subject, task, run)
    gradients, halves = [], []
    for middle in (125, 375, 625, 875):
        generator = run.generator(f"timestep {middle}")
        losses = []
        # The halves, 2 and 3 images, as the batches draw them.
        for sizes in ((2,), (3,)) if batch == 8 else ((2,), (2, 1)):
            errors = []
            for rows in sizes:
                drawn = task.batch(rows, generator)
                noise = torch.randn(drawn.clean.shape, generator=generator)
                steps = torch.full((rows,), middle)
                noisy, target = corrupt(subject.scheduler, drawn.clean, noise, steps)
                errors.append(subject.denoiser(noisy, steps).sample - target)
            losses.append(torch.cat(errors).pow(2).flatten(1).mean(1))

        def gradient(loss: torch.Tensor) -> torch.Tensor:
            subject.denoiser.zero_grad()
            loss.backward(retain_graph=True)
            return torch.cat([p.grad.flatten() for p in subject.denoiser.parameters()]).double()

        gradients.append(gradient(torch.cat(losses).mean()))
        halves.append(torch.cosine_similarity(*(gradient(half.mean()) for half in losses), dim=0))
    unit = nn.functional.normalize(torch.stack(gradients), dim=1)
    torch.testing.assert_close(run.records["free/similarity"], unit @ unit.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        run.records["free/reliability"], torch.stack(halves), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("beta", [1e-9, 0.5])
def test_images_and_noise_differ_between_timesteps(
    subject: Subject, task: moediff.Task, beta: float
) -> None:
    # Almost no noise, then almost nothing else: the denoiser sees the images or the noise alone.
    seen: list[torch.Tensor] = []
    handle = subject.denoiser.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=beta, beta_end=beta)
    subject = Subject(subject.denoiser, scheduler, subject.anatomy, (0, 1000))
    Alignment(stride=500, images=8, batch=8).cluster(subject, task, Run(experts=2))
    handle.remove()
    first, second = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert len(first) == len(second) == 8
    assert (first - second).abs().flatten(1).mean(1).min() > 0.1


def test_small_denoisers_are_not_sketched(subject: Subject, task: moediff.Task) -> None:
    size = sum(parameter.numel() for parameter in subject.denoiser.parameters())
    found = []
    for sketch in (None, size + size % 2, 4096):
        run = Run(experts=2)
        attrs.evolve(QUICK, sketch=sketch).cluster(subject, task, run)
        found.append(run.records["free/similarity"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_cut_of_sketched_gradients_is_within_a_hundredth_of_the_optimum() -> None:
    subject = moediff.installed().dissect(*digits.load_base())
    images = moediff.Task.from_arrays(*digits.load_images("train"), null_label=digits.NULL_LABEL)
    exact, sketched = Run(experts=2), Run(experts=2)
    for sketch, run in ((None, exact), (4096, sketched)):
        options = Alignment(stride=100, images=8, batch=8, sketch=sketch)
        options.cluster(subject, images, run)
    matrix, estimate = (run.records["free/similarity"].numpy() for run in (exact, sketched))
    assert not np.array_equal(matrix, estimate)
    for count in range(2, 9):
        best = best_cuts(matrix, count)[1]
        assert objective(matrix, best_cuts(estimate, count)[0]) >= 0.99 * best
    upper = np.triu_indices(len(matrix), 1)
    error = (estimate - matrix)[upper] / (1 - matrix[upper] ** 2)
    assert np.sqrt((error**2).mean()) <= 2 / np.sqrt(4096 - 2)


def test_alignment_end_to_end_leaves_everything_as_found(any_subject: Subject) -> None:
    denoiser = any_subject.denoiser.train()
    for index, parameter in enumerate(denoiser.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    flags = [p.requires_grad for p in denoiser.parameters()]
    weights = {key: value.clone() for key, value in denoiser.state_dict().items()}
    state = torch.get_rng_state()
    run = Run(experts=3)
    task = tiny_task(labelled=denoiser.class_embedding is not None)
    with torch.no_grad():  # what the caller has switched off does not matter
        intervals = QUICK.cluster(any_subject, task, run)
    assert len(intervals) == 3
    assert intervals.total == 1000
    assert set(intervals.cuts) <= set(range(0, 1001, 125))
    assert all(torch.equal(value, weights[key]) for key, value in denoiser.state_dict().items())
    assert [p.requires_grad for p in denoiser.parameters()] == flags
    assert all(p.grad is None for p in denoiser.parameters())
    assert denoiser.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in denoiser.modules())
    assert not any(p._backward_hooks for p in denoiser.parameters())
    similarity = run.records["free/similarity"]
    assert similarity.shape == (8, 8)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(8, dtype=torch.float64))
    assert run.records["free/reliability"].abs().max() < 1


def test_frozen_and_trainable_denoisers_are_split_alike(
    subject: Subject, task: moediff.Task
) -> None:
    first, second = Run(experts=2), Run(experts=2)
    QUICK.cluster(subject, task, first)
    subject.denoiser.requires_grad_(False)
    QUICK.cluster(subject, task, second)
    assert torch.equal(first.records["free/similarity"], second.records["free/similarity"])


def test_flags_are_restored_after_an_error(scheduler: DDPMScheduler, subject: Subject) -> None:
    subject.denoiser.requires_grad_(False)
    wrong = moediff.Task(torch.zeros(4, 1, 8, 8))
    with pytest.raises(RuntimeError, match="channels"):
        QUICK.cluster(subject, wrong, Run(experts=2))
    assert not any(p.requires_grad for p in subject.denoiser.parameters())


def test_same_seed_same_cuts_whatever_ran_before(subject: Subject, task: moediff.Task) -> None:
    runs = [Run(experts=2, seed=4), Run(experts=2, seed=4), Run(experts=2, seed=5)]
    for run in runs:
        torch.rand(7)
        run.generator("something else")
        QUICK.cluster(subject, task, run)
    first, again, other = (run.records["free/similarity"] for run in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_alignment_resumes_at_the_timestep_where_it_was_killed(
    subject: Subject, task: moediff.Task, tmp_path: Path
) -> None:
    whole = Run(experts=2)
    wanted = staged(whole, subject, task)
    with pytest.raises(KeyboardInterrupt):
        staged(Interrupted(experts=2, cache=tmp_path), subject, task)
    resumed = Run(experts=2, cache=tmp_path)
    assert staged(resumed, subject, task) == wanted
    assert set(resumed.records) == set(whole.records) == {f"intervals/{name}" for name in RECORDS}
    for key, wanted_record in whole.records.items():
        assert torch.equal(resumed.records[key], wanted_record), key
    assert whole.ledger["gradients"].samples == resumed.ledger["gradients"].samples == 8 * 6
    assert not list(tmp_path.glob("*.checkpoint"))


def test_alignment_asks_for_no_new_gradients_for_another_number_of_experts(
    subject: Subject, task: moediff.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = staged(Run(experts=3), subject, task)
    staged(Run(experts=2, cache=tmp_path), subject, task)
    monkeypatch.setattr(moediff.Task, "batch", None)
    assert staged(Run(experts=3, cache=tmp_path), subject, task) == wanted


def test_one_expert_takes_all(subject: Subject, task: moediff.Task) -> None:
    for clusterer in (Alignment(), LossSimilarity(), Uniform()):
        run = Run(experts=1)
        assert clusterer.cluster(subject, task, run).cuts == (0, 1000)
        assert not run.records


@pytest.mark.parametrize(("total", "stride", "cells"), [(1000, 300, 4), (10, 3, 4), (7, 100, 1)])
def test_cells_are_even_where_the_stride_does_not_divide(
    task: moediff.Task, total: int, stride: int, cells: int
) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=total)
    subject = Subject(Switch(total // 2), scheduler, Anatomy(()), (0, total))
    run = Run(experts=cells)
    intervals = Alignment(stride=stride, images=2).cluster(subject, task, run)
    assert intervals == Intervals.uniform(total, cells)


def test_too_few_cells_name_the_stride_that_would_do(subject: Subject, task: moediff.Task) -> None:
    with pytest.raises(OptionError, match=r"stride: got 200, which makes 5 cells.*at most 142"):
        Alignment(stride=200).cluster(subject, task, Run(experts=8))
    assert len(Alignment(stride=142, images=2).cluster(subject, task, Run(experts=8))) == 8


def test_gradients_that_are_not_finite_are_refused(subject: Subject, task: moediff.Task) -> None:
    with torch.no_grad():
        subject.denoiser.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="gradient at timestep 62 is not finite"):
        QUICK.cluster(subject, task, Run(experts=2))


@pytest.mark.parametrize(
    "options",
    [
        *({"stride": 0}, {"images": 1}, {"batch": 0}, {"images": 1.5}),
        *({"sketch": 0}, {"sketch": 4095}, {"sketch": 64.0}),
    ],
)
def test_alignment_refuses_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"alignment: .*{next(iter(options))}"):
        moediff.installed().create("clusterers", "alignment", options)


# Uniform


@given(st.integers(1, 50), st.integers(50, 1000))
def test_uniform_intervals_differ_by_one_timestep_at_most(experts: int, total: int) -> None:
    subject = Subject(
        nn.Identity(), DDPMScheduler(num_train_timesteps=total), Anatomy(()), (0, total)
    )
    intervals = Uniform().cluster(subject, tiny_task(count=1), Run(experts=experts))
    sizes = {high - low for low, high in intervals}
    assert len(intervals) == experts
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [("alignment", Alignment), ("loss-similarity", LossSimilarity), ("uniform", Uniform)],
)
def test_clusterers_are_found_by_name(name: str, kind: type) -> None:
    assert type(moediff.installed().create("clusterers", name, {})) is kind


def test_the_paper_takes_1024_images() -> None:
    assert Alignment().images == 1024
