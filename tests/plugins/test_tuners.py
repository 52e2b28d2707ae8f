"""Training: what it improves, whom it reaches, and that a killed run ends where it would have."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import moediff
from moediff.errors import MoediffError, NoEffectWarning, OptionError
from moediff.plan import Blueprint
from moediff.sampling import predict
from moediff.space import Chain, Scores, SearchSpace
from moediff.surgery import cut
from moediff.workdir import Run
from moediff_plugins.tuners.bitfit import BitFit
from moediff_plugins.tuners.distill import Distill
from moediff_plugins.tuners.elastic import Elastic, _depths
from moediff_plugins.tuners.finetune import Finetune
from moediff_plugins.tuners.partial import Partial
from moediff_plugins.tuners.training import share, trainable
from tests.conftest import tiny_unet
from tests.plugins.tuning import FAST, TINY, Weights, build, colours, equal, weights


@pytest.fixture
def task() -> moediff.Task:
    return colours()


@pytest.fixture
def dropout(scheduler: Any) -> moediff.Subject:
    """A base that draws from the global random state while it is trained."""
    return moediff.installed().dissect(tiny_unet(dropout=0.3), scheduler)


def space(expert: moediff.Subject) -> SearchSpace:
    """Every width by the L1 norm of what its consumer reads, and one chain of two layers."""
    anatomy = expert.anatomy
    values = torch.ones(len(anatomy.units))
    for name, width in anatomy.widths.items():
        read = expert.denoiser.get_submodule(width.consumer).weight.detach().transpose(0, 1)
        values[anatomy.spans[name]] = read.reshape(width.count, -1).abs().sum(1)
    chains = [
        Chain(name, tuple((values[span].argsort() + span.start).tolist()))
        for name, span in anatomy.spans.items()
    ]
    layers = tuple(anatomy.layer_units[f"down_blocks.{i}.resnets.1"] for i in (1, 0))
    return SearchSpace(anatomy, (*chains, Chain("layers", layers)), Scores(values))


def loss_of(
    denoiser: nn.Module, scheduler: Any, task: moediff.Task, interval: tuple[int, int] = (0, 1000)
) -> float:
    """The denoising loss on 256 fixed draws."""
    generator = torch.Generator().manual_seed(7)
    batch = task.batch(256, generator)
    timesteps = torch.randint(*interval, (256,), generator=generator)
    with torch.no_grad():
        return float(moediff.denoising_loss(denoiser, scheduler, batch, timesteps, generator))


def distance(mixture: nn.Module, teacher: moediff.Subject, task: moediff.Task) -> float:
    """Mean squared difference of the outputs on fixed noisy images at all timesteps."""
    generator = torch.Generator().manual_seed(7)
    clean = task.batch(256, generator).clean
    timesteps = torch.randint(0, 1000, (256,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = teacher.scheduler.add_noise(clean, noise, timesteps)
    with torch.no_grad():
        gap = predict(mixture, noisy, timesteps, {}) - predict(
            teacher.denoiser, noisy, timesteps, {}
        )
    return float(gap.square().mean())


# ------------------------------------------------------------------------------ what it improves


def test_finetune_lowers_every_interval_s_loss(subject: moediff.Subject, task: moediff.Task):
    mixture, run = build(subject), Run()
    before = [loss_of(mixture, subject.scheduler, task, span) for span in mixture.intervals]
    assert Finetune(steps=60, **FAST).recover(mixture, task, subject, run) is mixture
    after = [loss_of(mixture, subject.scheduler, task, span) for span in mixture.intervals]
    assert all(new < 0.7 * old for new, old in zip(after, before, strict=True)), (before, after)
    losses = run.records["free/loss-finetune"]
    assert losses.shape == (60,)
    assert losses[-10:].mean() < 0.7 * losses[:10].mean()


@pytest.mark.parametrize("images", [0, 12])
def test_distill_brings_the_mixture_nearer_to_the_full_model(
    subject: moediff.Subject, task: moediff.Task, images: int
):
    stranger = attrs.evolve(subject, denoiser=tiny_unet(seed=1))  # far from the full model
    mixture = build(stranger)
    before = distance(mixture, subject, task)
    run = Run(sampling=moediff.Sampling(steps=2))
    Distill(steps=50, images=images, **FAST).recover(mixture, task, subject, run)
    assert distance(mixture, subject, task) < 0.5 * before
    assert run.records["free/loss-tied"].shape == run.records["free/loss-own"].shape == (25,)


def test_distill_mix_trains_on_the_real_images_too(subject: moediff.Subject, task: moediff.Task):
    losses = []
    for mix in (0.0, 1.0):
        mixture = build(subject)
        Distill(steps=30, images=0, mix=mix, **FAST).recover(mixture, task, subject, Run())
        losses.append(loss_of(mixture, subject.scheduler, task))
    assert losses[1] < 0.8 * losses[0]  # the full model itself is untrained: it teaches no colours


def test_elastic_makes_sub_networks_work(subject: moediff.Subject, task: moediff.Task):
    intervals, run = moediff.Intervals((0, 1000)), Run()
    plain, elastic = (
        Elastic(depth_steps=depth, width_steps=width, p=p, ema=0.0, **FAST).prepare(
            subject.split(intervals), space, intervals, task, run
        )[0]
        for depth, width, p in [(120, 0, 0.0), (60, 60, 0.5)]
    )

    def narrow(expert: moediff.Subject) -> float:
        mask = torch.ones(len(expert.anatomy.units))
        for chain in space(expert).chains[:-1]:
            mask[list(chain.units[: len(chain.units) * 3 // 4])] = 0
        with moediff.masked(expert.denoiser, expert.anatomy, mask) as denoiser:
            return loss_of(denoiser, expert.scheduler, task)

    before, after = (run.records[f"free/subnets-{name}-0"] for name in ("before", "after"))
    assert (after < before).all()
    assert narrow(elastic) < 0.8 * narrow(plain)
    assert loss_of(elastic.denoiser, subject.scheduler, task) < 0.7 * loss_of(
        subject.denoiser, subject.scheduler, task
    )


# ---------------------------------------------------------------------------------- whom it reaches


@contextmanager
def gradients(mixture: moediff.ExpertMixture) -> Iterator[dict[int, set[int]]]:
    """Which timesteps each parameter had a gradient from."""
    seen: dict[int, set[int]] = {id(p): set() for p in mixture.parameters()}
    now: list[int] = []

    def enter(module: nn.Module, args: Any) -> None:
        now.extend(args[1].tolist())

    def arrived(parameter: torch.Tensor) -> None:
        seen[id(parameter)].update(now)

    def done(*_: Any) -> None:
        now.clear()

    handles = [p.register_post_accumulate_grad_hook(arrived) for p in mixture.parameters()]
    handles += [module.register_forward_pre_hook(enter) for module in set(mixture.experts)]
    handles.append(register_optimizer_step_post_hook(done))  # the next step has other timesteps
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def test_finetune_teaches_a_copy_its_own_timesteps_alone(
    subject: moediff.Subject, task: moediff.Task
):
    halves = {"up_blocks.0.resnets.0": (0, 0, 1)}
    mixture = build(subject, 3, **halves).untie()
    with gradients(mixture) as seen:
        Finetune(steps=12, **TINY).recover(mixture, task, subject, Run())
    owners: dict[int, set[int]] = {}
    for index, expert in enumerate(mixture.experts):
        for parameter in expert.parameters():
            owners.setdefault(id(parameter), set()).add(index)
    assert {frozenset(x) for x in owners.values()} == {
        frozenset(x) for x in ([0], [1], [2], [0, 1], [0, 1, 2])
    }
    for key, timesteps in seen.items():
        assert {int(mixture.route(t)) for t in timesteps} == owners[key]


@pytest.mark.parametrize("index", range(3))
def test_distill_teaches_a_copy_its_own_timesteps_alone(
    subject: moediff.Subject, task: moediff.Task, index: int, monkeypatch: pytest.MonkeyPatch
):
    sample = moediff.Intervals.sample
    monkeypatch.setattr(  # so that whoever moves has learned from this interval's rows
        moediff.Intervals, "sample", lambda self, count, draw: sample(self, count, draw, index)
    )
    layer = "up_blocks.0.resnets.0"
    mixture = build(subject, 3, **{layer: (0, 0, 1)}).untie()
    before = weights(mixture)
    tuner = Distill(steps=3, tied_share=0, images=0, weight_decay=0.1, **TINY)
    tuner.recover(mixture, task, attrs.evolve(subject, denoiser=tiny_unet(seed=1)), Run())
    reached = {id(p) for p in mixture.experts[index].parameters()}
    for name, parameter in mixture.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (id(parameter) in reached), name  # shared ones too: none is frozen before


def test_a_step_leaves_the_other_experts_bit_equal(subject: moediff.Subject, task: moediff.Task):
    # Neither weight decay nor the momentum of earlier steps may move what a step does not train.
    settings = {"weight_decay": 0.1, "schedule": "constant", "ema": 0.0, **TINY}
    runs = [build(subject).untie()]
    with pytest.warns(NoEffectWarning, match="experts from 1 on were not trained"):
        runs.append(Finetune(steps=1, **settings).recover(build(subject), task, subject, Run()))
    runs += [
        Finetune(steps=steps, **settings).recover(build(subject), task, subject, Run())
        for steps in (2, 3)
    ]
    shared = {n for n, p in runs[0].experts[0].named_parameters() if p is _same(runs[0], 1, n)}
    for step, (old, new) in enumerate(itertools.pairwise(runs)):
        for index, expert in enumerate(new.experts):
            for name, parameter in expert.named_parameters():
                moved = not torch.equal(parameter, _same(old, index, name))
                assert moved == (name in shared or index == step % 2), (step, index, name)


def _same(mixture: moediff.ExpertMixture, index: int, name: str) -> nn.Parameter:
    return mixture.experts[index].get_parameter(name)


def test_shared_modules_stay_one_object_and_are_saved_once(
    subject: moediff.Subject, task: moediff.Task, tmp_path: Path
):
    for tuner in (Finetune(steps=4, **TINY), Distill(steps=4, images=0, **TINY)):
        mixture = tuner.recover(build(subject), task, subject, Run())
        first, second = mixture.experts
        assert not mixture.tied
        assert first.conv_in is second.conv_in
        assert first.time_embedding.linear_1 is second.time_embedding.linear_1
        assert first.up_blocks[0].resnets[0] is not second.up_blocks[0].resnets[0]
        mixture.save_pretrained(tmp_path)
        loaded = moediff.ExpertMixture.from_pretrained(tmp_path)
        assert loaded.experts[0].conv_in is loaded.experts[1].conv_in
        assert equal(weights(loaded), weights(mixture))


def test_distill_freezes_undivided_modules_after_the_tied_phase(
    subject: moediff.Subject, task: moediff.Task
):
    settings = {"images": 0, "schedule": "constant", **TINY}
    tied, both = build(subject), build(subject)
    Distill(steps=4, tied_share=1, **settings).recover(tied, task, subject, Run())
    Distill(steps=8, tied_share=0.5, **settings).recover(both, task, subject, Run())
    shared = {id(p) for p in both.experts[0].parameters()}
    counts = {True: 0, False: 0}
    for name, parameter in both.experts[1].named_parameters():
        same = torch.equal(parameter, tied.experts[1].get_parameter(name))
        assert same == (id(parameter) in shared), name
        counts[same] += 1
    assert min(counts.values()) > 0


def test_distill_trains_everything_in_both_phases_where_nothing_is_divided(
    subject: moediff.Subject, task: moediff.Task
):
    mixture = build(subject, 1)
    before = weights(mixture)
    run = Run()
    Distill(steps=2, tied_share=0, images=0, **TINY).recover(mixture, task, subject, run)
    assert not any(torch.equal(before[name], p) for name, p in mixture.named_parameters())
    assert run._stages[0].spent.steps == 2


def test_the_tied_phase_sees_all_timesteps(subject: moediff.Subject, task: moediff.Task):
    mixture = build(subject)
    with gradients(mixture) as seen:
        tuner = Distill(steps=10, tied_share=1, images=0, **FAST)
        tuner.recover(mixture, task, subject, Run())
    timesteps = seen[id(mixture.experts[0].conv_in.weight)]
    assert timesteps == seen[id(mixture.experts[0].up_blocks[0].resnets[0].conv1.weight)]
    assert len(timesteps) > 60
    assert min(timesteps) < 100 < 900 < max(timesteps)


# ------------------------------------------------------------------------------------------ elastic


def test_elastic_leaves_the_base_alone_and_experts_differ(
    subject: moediff.Subject, task: moediff.Task
):
    intervals = moediff.Intervals((0, 300, 1000))
    before = weights(subject.denoiser)
    given = subject.split(intervals)
    run = Run()
    tuned = Elastic(depth_steps=3, width_steps=3, **TINY).prepare(
        given, space, intervals, task, run
    )
    assert equal(weights(subject.denoiser), before)
    assert all(p.grad is None for p in subject.denoiser.parameters())
    assert [expert.interval for expert in tuned] == list(intervals)
    one, other = (weights(expert.denoiser) for expert in tuned)
    assert not any(equal(one, weights) for weights in (before, other))
    losses = {"depth-0": 2, "depth-1": 1, "width-0": 2, "width-1": 1}
    subnets = {f"subnets{what}-{i}": 12 for what in ("", "-before", "-after") for i in (0, 1)}
    wanted = {**{f"loss-{name}": steps for name, steps in losses.items()}, **subnets}
    assert {name.removeprefix("free/"): len(r) for name, r in run.records.items()} == wanted
    assert all(not m.training and not m._forward_hooks for e in tuned for m in e.denoiser.modules())


def test_elastic_passes_over_layers_and_trains_the_others(
    subject: moediff.Subject, task: moediff.Task
):
    intervals = moediff.Intervals((0, 1000))
    dropped = (
        "down_blocks.0.resnets.1.",
        "down_blocks.1.resnets.1.",
        "down_blocks.1.attentions.1.",
    )
    for p in (0.0, 1.0):
        tuner = Elastic(depth_steps=1, width_steps=0, p=p, ema=0.0, **FAST)
        expert = tuner.prepare(subject.split(intervals), space, intervals, task, Run())[0]
        for name, parameter in expert.denoiser.named_parameters():
            untouched = torch.equal(parameter, subject.denoiser.get_parameter(name))
            assert untouched == (p == 1.0 and name.startswith(dropped)), name


def test_layers_are_passed_over_independently(subject: moediff.Subject):
    draw, generator = _depths(space(subject), 0.3), torch.Generator().manual_seed(0)
    layers = list(space(subject).chains[-1].units)
    masks = torch.stack([draw(generator) for _ in range(2000)])
    gone = 1 - masks[:, layers]
    assert masks.sum() + gone.sum() == masks.numel()  # nothing else is ever closed
    # Five standard deviations of a mean of 2000 draws, at most.
    assert torch.allclose(gone.mean(0), torch.full((2,), 0.3), atol=5 * 0.46 / math.sqrt(2000))
    assert float(gone.prod(1).mean()) == pytest.approx(0.09, abs=5 * 0.29 / math.sqrt(2000))


def test_widths_lose_the_least_important_of_the_depth_tuned_expert(
    subject: moediff.Subject, task: moediff.Task
):
    intervals = moediff.Intervals((0, 1000))
    width = subject.anatomy.widths["up_blocks.0.resnets.0.groups"]
    counts: list[int] = []
    orders: list[tuple[int, ...]] = []
    closed: list[set[int]] = []

    def rank(expert: moediff.Subject) -> SearchSpace:
        found = space(expert)
        start = found.anatomy.spans[width.name].start
        chain = next(chain for chain in found.chains if chain.name == width.name)
        orders.append(tuple(unit - start for unit in chain.units))
        counts.append(len(closed))
        return found

    def spy(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        power = args[0].detach().abs().sum((0, 2, 3)).view(width.count, width.size).sum(1)
        closed.append(set((power == 0).nonzero().flatten().tolist()))

    handle = subject.denoiser.get_submodule(width.consumer).register_forward_hook(spy)
    tuner = Elastic(depth_steps=30, width_steps=40, **{**TINY, "learning_rate": 0.03, "subnets": 0})
    tuner.prepare(subject.split(intervals), rank, intervals, task, Run())
    handle.remove()
    assert counts == [0, 30]  # ranked again, between the phases
    assert len(orders[1]) == width.count == 4
    assert orders[1] != orders[0]
    assert not any(closed[:30])
    assert {len(gone) for gone in closed[30:]} == {0, 1, 2, 3}  # floor(4 r); one always stays
    assert all(gone == set(orders[1][: len(gone)]) for gone in closed[30:])


def test_sub_networks_are_judged_by_one_batch_before_and_after(
    subject: moediff.Subject, task: moediff.Task
):
    intervals = moediff.Intervals((0, 300, 1000))
    given, run = subject.split(intervals), Run()
    tuner = Elastic(depth_steps=2, width_steps=2, p=0.5, **TINY)
    tuned = tuner.prepare(given, space, intervals, task, run)
    units = subject.anatomy.units
    for index, expert in enumerate(tuned):
        masks = run.records[f"free/subnets-{index}"]
        assert masks.shape == (12, len(units))
        assert len({tuple(mask.tolist()) for mask in masks}) == 12
        by_kind = [[m for m, u in zip(masks.T, units, strict=True) if (u.width is None) == layer]
                   for layer in (True, False)]  # fmt: skip
        assert all(0 < float(torch.stack(kind).mean()) < 1 for kind in by_kind)  # both ways at once
        for name, judged in (("before", given[index]), ("after", expert)):
            for row in (0, 11):
                generator = run.generator(f"judge-{index}")
                batch = task.batch(TINY["batch"], generator)
                timesteps = torch.randint(*intervals[index], (TINY["batch"],), generator=generator)
                net = cut(
                    judged.denoiser, judged.anatomy, Blueprint.from_mask(judged.anatomy, masks[row])
                )
                with torch.no_grad():
                    loss = moediff.denoising_loss(
                        net, subject.scheduler, batch, timesteps, generator
                    )
                found = run.records[f"free/subnets-{name}-{index}"][row]
                assert float(found) == pytest.approx(float(loss), rel=1e-5)
        before, after = (
            run.records[f"free/subnets-{name}-{index}"] for name in ("before", "after")
        )
        assert not torch.equal(before, after)


def test_masks_still_hold_under_gradient_checkpointing(
    subject: moediff.Subject, task: moediff.Task
):
    intervals = moediff.Intervals((0, 1000))
    tuner = Elastic(depth_steps=3, width_steps=3, schedule="constant", **TINY)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            subject.denoiser.enable_gradient_checkpointing()
        expert = tuner.prepare(subject.split(intervals), space, intervals, task, Run())[0]
        results.append(weights(expert.denoiser))
    assert equal(*results)


# ------------------------------------------------------------------------ resuming, reproducibility

Job = Callable[[moediff.Subject, moediff.Task, Run], tuple[nn.Module, ...]]


def _job(tuner: Any) -> Job:
    def work(subject: moediff.Subject, task: moediff.Task, run: Run) -> tuple[nn.Module, ...]:
        if hasattr(tuner, "recover"):
            return (tuner.recover(build(subject), task, subject, run),)
        intervals = moediff.Intervals.uniform(1000, 2)
        tuned = tuner.prepare(subject.split(intervals), space, intervals, task, run)
        return tuple(expert.denoiser for expert in tuned)

    return work


EVERY: dict[str, Any] = {"save_every": 2, "weight_decay": 0.1, "ema": 0.9, **TINY, "warmup": 0.2}
JOBS: dict[str, Job] = {
    "distill": _job(Distill(steps=10, images=4, mix=0.3, **EVERY)),
    "elastic": _job(Elastic(depth_steps=10, width_steps=10, subnets=2, **EVERY)),
    "finetune": _job(Finetune(steps=10, **EVERY)),
    "bitfit": _job(BitFit(steps=10, **EVERY)),
    "partial": _job(Partial(steps=10, **EVERY)),
}


def _stage(job: Job, subject: moediff.Subject, task: moediff.Task, run: Run) -> list[Weights]:
    """Run a job as the engine does: as a stage, from whose folder an unfinished one goes on."""

    def pack(states: list[Weights]) -> tuple[Weights, Any]:
        return {f"{i}.{k}": v.clone() for i, s in enumerate(states) for k, v in s.items()}, None

    return run.stage(
        "work",
        [],
        lambda: [weights(module) for module in job(subject, task, run)],
        pack,
        lambda tensors, _: [tensors],
    )


@pytest.mark.parametrize("name", sorted(JOBS))
def test_a_killed_run_ends_bit_equal(
    name: str, dropout: moediff.Subject, task: moediff.Task, tmp_path: Path
):
    calls, limit = [0], [10**9]

    def count(*_: Any) -> None:
        calls[0] += 1
        if calls[0] > limit[0]:
            raise KeyboardInterrupt

    # Copies of the base carry the hook along, so every forward pass of a job is counted.
    handle = dropout.denoiser.conv_in.register_forward_hook(count)

    def fresh(folder: str) -> Run:
        calls[0] = 0
        return Run(cache=tmp_path / folder, sampling=moediff.Sampling(steps=2))

    whole = fresh("whole")
    expected = _stage(JOBS[name], dropout, task, whole)
    total = calls[0]
    for share_done in (0.08, 0.45, 0.7, 0.97):
        limit[0] = int(total * share_done)
        killed = fresh(f"killed-{share_done}")
        torch.manual_seed(int(share_done * 100))
        with pytest.raises(KeyboardInterrupt):
            _stage(JOBS[name], dropout, task, killed)
        limit[0] = 10**9
        resumed = fresh(f"killed-{share_done}")
        found = _stage(JOBS[name], dropout, task, resumed)
        assert all(equal(*pair) for pair in zip(found, expected, strict=True)), share_done
        assert calls[0] < total or share_done < 0.1  # nothing was saved yet so early
        for key, record in whole.records.items():
            assert torch.equal(resumed.records[key], record)
        spent, wanted = resumed.ledger["work"], whole.ledger["work"]
        assert (spent.samples, spent.steps) == (wanted.samples, wanted.steps)
        assert not list((tmp_path / f"killed-{share_done}").glob("*.checkpoint"))
    handle.remove()


@pytest.mark.parametrize("name", sorted(JOBS))
def test_same_seed_same_weights_whatever_ran_before(
    name: str, dropout: moediff.Subject, task: moediff.Task
):
    results = []
    for seed, noise in [(0, 1), (0, 2), (1, 1)]:
        torch.manual_seed(noise)
        np.random.seed(noise)
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        run = Run(seed=seed, sampling=moediff.Sampling(steps=2))
        results.append([weights(m) for m in JOBS[name](dropout, task, run)])
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])
    first, again, other = results
    assert all(equal(*pair) for pair in zip(first, again, strict=True))
    assert not any(equal(*pair) for pair in zip(first, other, strict=True))


# -------------------------------------------------------------------------------- the training loop


@pytest.mark.parametrize("name", sorted(JOBS))
def test_models_come_back_in_eval_mode_without_gradients(
    name: str, dropout: moediff.Subject, task: moediff.Task
):
    dropout.denoiser.conv_in.requires_grad_(False)
    dropout.denoiser.train()
    before = weights(dropout.denoiser)
    modes: list[bool] = []

    def spy(module: nn.Module, *_: Any) -> None:
        modes.append(module.training == torch.is_grad_enabled())  # dropout is for those that learn

    dropout.denoiser.conv_in.register_forward_hook(spy)  # copies carry it along
    trained = JOBS[name](dropout, task, Run(sampling=moediff.Sampling(steps=2)))
    assert len(modes) >= 10
    assert all(modes)
    for module in trained:
        assert not any(m.training for m in module.modules())
        assert all(p.grad is None for p in module.parameters())
        for parameter, value in module.named_parameters():
            assert value.requires_grad == ("conv_in." not in parameter), parameter
            if not value.requires_grad:
                assert torch.equal(value, before[f"conv_in.{parameter.rpartition('.')[2]}"])
    assert dropout.denoiser.training
    assert equal(weights(dropout.denoiser), before)


def test_the_moving_average_replaces_the_weights(subject: moediff.Subject, task: moediff.Task):
    def after(steps: int, ema: float) -> torch.Tensor:
        mixture = build(subject, 1)
        settings = {"schedule": "constant", "ema": ema, **TINY}
        Finetune(steps=steps, **settings).recover(mixture, task, subject, Run())
        return mixture.experts[0].conv_in.weight.detach().clone()

    w1, w2, w3 = (after(steps, 0.0) for steps in (1, 2, 3))
    # diffusers lets the decay rise: 0, 2/11, 3/12, ..., at most `ema`.
    average = w1 + (1 - 0.1) * (w2 - w1)
    average = average + (1 - 0.1) * (w3 - average)
    assert torch.allclose(after(3, 0.1), average, atol=1e-6)
    assert not torch.allclose(w3, average, atol=1e-4)


def test_only_a_finite_loss_makes_a_step(
    subject: moediff.Subject, task: moediff.Task, tmp_path: Path
):
    mixture = build(subject)
    run = Run(cache=tmp_path)
    settings = {**TINY, "learning_rate": 1e30, "schedule": "constant", "save_every": 1}

    def work() -> Any:
        return Finetune(steps=6, **settings).recover(mixture, task, subject, run).pack()

    with pytest.raises(MoediffError, match=r"finetune: .*step \d, learning rate 1e\+30.*Lower"):
        run.stage("recover", [], work, lambda packed: packed, lambda *packed: packed)
    assert not list(tmp_path.glob("*.safetensors"))
    assert not any(m.training for m in mixture.modules())
    assert all(p.grad is None and p.requires_grad for p in mixture.parameters())


def test_a_gradient_that_is_not_finite_is_refused_before_the_step(
    subject: moediff.Subject, task: moediff.Task
):
    mixture = build(subject, 1)
    mixture.experts[0].conv_in.weight.register_hook(lambda grad: grad * math.nan)
    before = weights(mixture)
    with pytest.raises(MoediffError, match="its gradient's norm nan at step 0"):
        Finetune(steps=2, **TINY).recover(mixture, task, subject, Run())
    assert equal(weights(mixture), before)


@pytest.mark.parametrize("name", sorted(JOBS))
def test_no_steps_no_effect(name: str, subject: moediff.Subject, task: moediff.Task):
    fields = {"depth_steps": 0, "width_steps": 0} if name == "elastic" else {"steps": 0}
    tuner = moediff.installed().create("tuners", name, fields)
    run = Run()
    with pytest.warns(NoEffectWarning, match="nothing was trained"):
        modules = _job(tuner)(subject, task, run)
    spent = run._stages[0].spent
    looked = 1 if name == "partial" else 0  # at the order of the layers
    assert (spent.samples, spent.steps) == (looked, 0)
    untrained = (
        build(subject).untie() if name != "elastic" else subject.denoiser,
        *modules[1:],
    )
    assert all(equal(weights(m), weights(u)) for m, u in zip(modules, untrained, strict=True))


def test_steps_and_samples_are_accounted(subject: moediff.Subject, task: moediff.Task):
    run = Run(sampling=moediff.Sampling(steps=3))
    Finetune(steps=3, **TINY).recover(build(subject), task, subject, run)
    spent = run._stages[0].spent
    assert (spent.steps, spent.samples) == (3, 6)
    Distill(steps=4, images=5, mix=0.5, **TINY).recover(build(subject), task, subject, run)
    # 5 images of 3 calls; then mixture and teacher on one batch, and the mixture on a real one.
    assert run.ledger["teacher-images"].samples == 5 * 3
    assert (spent.steps, spent.samples) == (3 + 4, 6 + 4 * 3 * 2)


@pytest.mark.parametrize(("steps", "count"), [(0, 3), (2, 3), (7, 3), (9, 3), (5, 1)])
def test_shares_are_even_and_add_up(steps: int, count: int):
    shares = [share(steps, count, index) for index in range(count)]
    assert sum(shares) == steps
    assert shares == [len(range(steps)[index::count]) for index in range(count)]


def test_a_base_that_is_frozen_whole_is_refused(subject: moediff.Subject, task: moediff.Task):
    frozen = copy.deepcopy(subject.denoiser).requires_grad_(False)
    with pytest.raises(OptionError, match="requires_grad_"):
        trainable(frozen)
    mixture = build(attrs.evolve(subject, denoiser=frozen))
    with pytest.raises(OptionError, match="all frozen"):
        Finetune(steps=2, **TINY).recover(mixture, task, subject, Run())


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *((tuner, "learning_rate", 0.0) for tuner in sorted(JOBS)),
        *((tuner, "batch", 0) for tuner in sorted(JOBS)),
        *((tuner, "schedule", "linear") for tuner in sorted(JOBS)),
        *((tuner, "ema", 1.0) for tuner in sorted(JOBS)),
        *((tuner, "warmup", 1.0) for tuner in sorted(JOBS)),
        *((tuner, "clip", 0.0) for tuner in sorted(JOBS)),
        *((tuner, "precision", "half") for tuner in sorted(JOBS)),
        ("distill", "tied_share", 1.1),
        ("distill", "mix", -0.1),
        ("distill", "images", -1),
        ("distill", "sampling", "ddim"),
        ("elastic", "p", 1.5),
        ("elastic", "width_steps", -1),
        ("finetune", "steps", -1),
        ("partial", "share", 0.0),
        ("partial", "share", 1.1),
    ],
)
def test_options_outside_their_range_are_refused(name: str, option: str, value: Any):
    with pytest.raises(OptionError, match=option):
        moediff.installed().create("tuners", name, {option: value})


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("name", sorted(JOBS))
def test_bf16_is_for_the_losses_alone(name: str, subject: moediff.Subject, task: moediff.Task):
    """Weights stay float32, and so does all that is no training: the teacher's images."""
    count = (
        {"steps": 3} if name != "elastic" else {"depth_steps": 2, "width_steps": 2, "subnets": 0}
    )
    kinds: list[tuple[torch.dtype, bool]] = []

    def spy(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        kinds.append((output.dtype, torch.is_grad_enabled() or module.training))

    # Copies carry the hook along. The full model teaches without gradients.
    subject.denoiser.conv_in.register_forward_hook(spy)
    results, types = [], []
    for precision in ("full", "bf16"):
        fields = {**count, **TINY, "ema": 0.0, "precision": precision}
        if name == "distill":
            fields |= {"images": 2}
        tuner = moediff.installed().create("tuners", name, fields)
        kinds.clear()
        run = Run(sampling=moediff.Sampling(steps=2))
        modules = _job(tuner)(subject, task, run)
        results.append([weights(module) for module in modules])
        types.append(list(kinds))
        assert all(loss.isfinite().all() for loss in run.records.values())
    assert {kind for kind, _ in types[0]} == {torch.float32}
    assert {kind for kind, learns in types[1] if learns} == {torch.bfloat16}
    others = [kind for kind, learns in types[1] if not learns]
    generated = 2 if name == "distill" else 1 if name == "partial" else 0
    assert others[:generated] == [torch.float32] * generated
    assert set(others[generated:]) <= {torch.bfloat16}  # the full model's answers
    assert (len(others) > generated) == (name == "distill")
    for one, other in zip(*results, strict=True):
        assert {value.dtype for value in other.values()} == {torch.float32}
        assert not equal(one, other)


def test_bf16_learns(subject: moediff.Subject, task: moediff.Task):
    mixture = build(subject)
    before = loss_of(mixture, subject.scheduler, task)
    Finetune(steps=60, precision="bf16", **FAST).recover(mixture, task, subject, Run())
    assert loss_of(mixture, subject.scheduler, task) < 0.7 * before
