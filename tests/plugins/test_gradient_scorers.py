"""The scorers that read gradients, against the same figures made the long way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from diffusers import DDPMScheduler

import moediff
from moediff import Run, Sampling, Subject
from moediff.masking import masked
from moediff.sampling import generate, initial_noise
from moediff_plugins.scorers.ablation_l1_sketch import AblationL1Sketch
from moediff_plugins.scorers.channels import ablated, by_unit, channel_counts, images_of
from moediff_plugins.scorers.diff_pruning import DiffPruning
from moediff_plugins.scorers.gradient import Gradient
from moediff_plugins.scorers.losses import denoising_losses
from moediff_plugins.scorers.taylor import Taylor
from moediff_plugins.scorers.weights import norm_per_weight
from tests.conftest import tiny_unet
from tests.plugins.test_scorers import DIFFUSERS, Interrupted, part, staged

# The sketch


def jacobian(subject: Subject, task: moediff.Task, run: Run, images: int) -> torch.Tensor:
    """The derivative (images, pixels, M) of every pixel by every channel's mask, pixel by pixel."""
    masks = torch.ones(images, sum(channel_counts(subject.anatomy)), dtype=torch.float64)
    masks.requires_grad_(True)
    made = images_of(ablated(subject, masks), subject, task, run, range(images)).flatten(1)
    rows = [
        torch.autograd.grad(made[:, pixel].sum(), masks, retain_graph=True)[0]
        for pixel in range(made.shape[1])
    ]
    return torch.stack(rows, dim=1)


@pytest.mark.filterwarnings(DIFFUSERS)
@pytest.mark.parametrize(
    ("scheduler_name", "rounding"),
    [("ddim", 1e-8), ("dpmsolver++", 1e-6)],  # diffusers' DPM-Solver steps in float32
)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_sketch_is_the_formula_on_the_exact_jacobian(
    subject: Subject, task: moediff.Task, norm: Any, scheduler_name: str, rounding: float
) -> None:
    subject = part(subject, 2, double=True)
    run = Run(sampling=Sampling(scheduler_name, 3))
    scorer = AblationL1Sketch(norm=norm, projections=3, images=2, batch=4)
    scores = scorer.score(subject, task, run)
    exact = jacobian(subject, task, run, images=2)
    effects = []
    for image in range(2):
        draws = torch.stack(
            [scorer._projection(subject.shape, run, image * 3 + k).flatten() for k in range(3)]
        )
        pulled = (draws.double() @ exact[image]).abs()  # (projections, M)
        middle = pulled.sort(dim=0).values[1]
        effects.append(middle if norm == "l1" else pulled.square().mean(0).sqrt())
    pixels = exact.shape[1] if norm == "l1" else exact.shape[1] ** 0.5
    wanted = by_unit(subject.anatomy, torch.stack(effects).mean(0) / pixels, "sum")
    torch.testing.assert_close(scores.values, wanted, rtol=rounding, atol=1e-14)


def test_many_projections_find_the_norms_of_the_jacobian(
    subject: Subject, task: moediff.Task
) -> None:
    subject = part(subject, 4, double=True)
    run = Run(sampling=Sampling(steps=1))
    exact = jacobian(subject, task, run, images=1)[0]
    for norm, wanted in (("l1", exact.abs().mean(0)), ("l2", exact.square().mean(0).sqrt())):
        AblationL1Sketch(norm=norm, projections=2000, images=1, batch=500).score(  # type: ignore[arg-type]
            subject, task, run
        )
        # 1.6 / sqrt(2000) is 4 %; the largest of some tens of channels lies at three times that.
        torch.testing.assert_close(run.records["free/channels"], wanted, rtol=0.15, atol=0)


def test_a_small_change_of_a_mask_moves_the_images_as_the_sketch_says(
    subject: Subject, task: moediff.Task
) -> None:
    subject = part(subject, 2, double=True)
    run = Run(sampling=Sampling(steps=3))
    exact = jacobian(subject, task, run, images=1)[0]
    channels = exact.shape[1]
    step = 1e-5
    masks = torch.ones(channels, channels, dtype=torch.float64) - step * torch.eye(channels)
    with torch.no_grad():
        moved = images_of(ablated(subject, masks), subject, task, run, [0] * channels)
        whole = images_of(subject.denoiser, subject, task, run, [0])
    effect = (moved - whole).abs().flatten(1).sum(1) / step
    torch.testing.assert_close(effect, exact.abs().sum(0), rtol=1e-3, atol=1e-8)


def test_the_sketch_does_not_depend_on_the_batch(subject: Subject, task: moediff.Task) -> None:
    subject = part(subject, 2, double=True)
    run = Run(sampling=Sampling(steps=2))
    small, large = (
        AblationL1Sketch(images=2, projections=3, batch=batch).score(subject, task, run).values
        for batch in (1, 64)
    )
    torch.testing.assert_close(small, large, rtol=1e-9, atol=1e-15)


def test_the_sketch_resumes_where_it_was_killed(
    subject: Subject, task: moediff.Task, tmp_path: Path
) -> None:
    scorer = AblationL1Sketch(images=2, projections=4, batch=2)
    sampling = Sampling(steps=2)
    whole, rows = Run(sampling=sampling), []
    subject.denoiser.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    wanted = staged(whole, scorer, subject, task)
    in_all = sum(rows)
    with pytest.raises(KeyboardInterrupt):
        staged(Interrupted(sampling=sampling, cache=tmp_path), scorer, subject, task)
    rows.clear()
    resumed = Run(sampling=sampling, cache=tmp_path)
    assert torch.equal(staged(resumed, scorer, subject, task).values, wanted.values)
    # Three of four batches were not done again, but they were spent.
    assert sum(rows) == in_all / 4
    assert resumed.ledger["scores"].samples == whole.ledger["scores"].samples


def test_the_sketch_keeps_no_activations_between_steps(
    subject: Subject, task: moediff.Task
) -> None:
    """What autograd holds when the image is made grows by a few samples a step, not by a pass."""

    def kept(steps: int) -> int:
        held: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held.append(tensor.numel())
            return tensor

        masks = torch.ones(1, sum(channel_counts(subject.anatomy)), requires_grad=True)
        from moediff_plugins.scorers.ablation_l1_sketch import _thrifty

        call = _thrifty(ablated(subject, masks))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            images_of(call, subject, task, Run(sampling=Sampling(steps=steps)), [0])
        return sum(held)

    sample = torch.Size(subject.shape).numel()
    assert kept(8) - kept(4) <= 4 * 8 * sample


def test_the_sketch_follows_guidance(scheduler: Any) -> None:
    task = moediff.Task(
        torch.zeros(4, 3, 8, 8),
        {"class_labels": torch.arange(4) % 3},
        {"class_labels": torch.tensor([3])},
    )
    subject = moediff.installed().dissect(tiny_unet("class-conditional"), scheduler)
    subject = part(subject, 1, double=True)
    plain, guided = (
        AblationL1Sketch(images=2, projections=2).score(
            subject, task, Run(sampling=Sampling(steps=2, guidance=guidance))
        )
        for guidance in (1.0, 3.0)
    )
    assert not torch.allclose(plain.values, guided.values, rtol=0.05)


# Taylor


def test_taylor_is_the_mean_absolute_slope_sample_by_sample(
    subject: Subject, task: moediff.Task
) -> None:
    subject = attrs.evolve(subject, denoiser=subject.denoiser.double(), interval=(200, 700))
    task = attrs.evolve(task, samples=task.samples.double())
    scores = Taylor(samples=5, batch=3).score(subject, task, Run()).values
    run, wanted = Run(), torch.zeros(len(subject.anatomy.units), dtype=torch.float64)
    for start, rows in ((0, 3), (3, 2)):
        for row in range(rows):
            masks = torch.ones(len(subject.anatomy.units), dtype=torch.float64, requires_grad=True)
            with masked(subject.denoiser, subject.anatomy, masks):
                losses = denoising_losses(subject, task, rows, run.generator(f"batch-{start}"))
            wanted += torch.autograd.grad(losses[row], masks)[0].abs() / 5
    torch.testing.assert_close(scores, wanted, rtol=1e-9, atol=1e-15)
    assert scores.min() > 0


def test_taylor_finds_the_unit_that_nobody_reads(subject: Subject, task: moediff.Task) -> None:
    name, width = next(iter(subject.anatomy.widths.items()))
    with torch.no_grad():
        subject.denoiser.get_submodule(width.consumer).weight[:, : width.size] = 0
    values = Taylor(samples=4).score(subject, task, Run()).values
    span = subject.anatomy.spans[name]
    assert values[span.start] == 0
    assert values[span.start + 1 : span.stop].min() > 0


# Gradient


def test_gradient_is_that_of_one_large_batch(subject: Subject, task: moediff.Task) -> None:
    subject.denoiser.double()
    task = attrs.evolve(task, samples=task.samples.double())
    scores = Gradient(samples=6, batch=4).score(subject, task, Run()).values
    run = Run()
    losses = [
        denoising_losses(subject, task, rows, run.generator(f"batch-{start}"))
        for start, rows in ((0, 4), (4, 2))
    ]
    torch.cat(losses).mean().backward()
    wanted = norm_per_weight(subject, lambda weight: weight.grad)  # type: ignore[arg-type, return-value]
    torch.testing.assert_close(scores, wanted, rtol=1e-9, atol=0)


def test_gradient_gives_frozen_weights_nothing(subject: Subject, task: moediff.Task) -> None:
    name, width = next(iter(subject.anatomy.widths.items()))
    path = f"{name.rpartition('.')[0]}.conv1"
    subject.denoiser.get_submodule(path).weight.requires_grad_(False)
    values = Gradient(samples=4).score(subject, task, Run()).values
    assert torch.equal(values[subject.anatomy.spans[name]], torch.zeros(width.count).double())
    assert values.max() > 0


@pytest.mark.parametrize("scorer", [Taylor, Gradient])
def test_losses_are_drawn_from_the_interval(
    subject: Subject, task: moediff.Task, scorer: Any
) -> None:
    seen: list[int] = []
    handle = subject.denoiser.register_forward_pre_hook(
        lambda _, args: seen.extend(args[1].tolist())
    )
    assert scorer(by_interval=True).needs == {"intervals"}
    scorer(samples=40).score(attrs.evolve(subject, interval=(300, 400)), task, Run())
    handle.remove()
    assert len(seen) == 40
    assert 300 <= min(seen) < max(seen) < 400


def test_losses_are_those_of_training(subject: Subject, task: moediff.Task) -> None:
    losses = denoising_losses(subject, task, 7, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    batch = task.batch(7, generator)
    timesteps = subject.timesteps(7, generator)
    whole = moediff.denoising_loss(subject.denoiser, subject.scheduler, batch, timesteps, generator)
    assert losses.shape == (7,)
    assert losses.mean().item() == pytest.approx(whole.item(), rel=1e-5)


def test_noise_and_prompts_of_a_row_do_not_depend_on_the_others(
    subject: Subject, task: moediff.Task
) -> None:
    run = Run(sampling=Sampling(steps=2))
    subject = attrs.evolve(subject, denoiser=subject.denoiser.double())
    with torch.no_grad():
        three = images_of(subject.denoiser, subject, task, run, [2, 0, 2])
        seeds = run.sampling.seeds(3)
        noise = initial_noise(seeds, subject.shape).double()
        all_three = generate(
            subject.denoiser, subject.scheduler, run.sampling, noise, {}, {}, seeds
        )
    torch.testing.assert_close(three, all_three[[2, 0, 2]], rtol=1e-9, atol=1e-12)


# Taylor over timesteps


def doubled(subject: Subject, task: moediff.Task, *interval: int) -> tuple[Subject, moediff.Task]:
    subject = attrs.evolve(subject, denoiser=subject.denoiser.double(), interval=interval)
    return subject, attrs.evolve(task, samples=task.samples.double())


def walk(scorer: DiffPruning, subject: Subject, task: moediff.Task) -> tuple[torch.Tensor, Run]:
    run = Run()
    return scorer.score(subject, task, run).values, run


def losses_at(subject: Subject, task: moediff.Task, samples: int) -> Callable[[int], torch.Tensor]:
    """The mean loss at a timestep, from the same images and noise as the scorer's one batch."""

    def loss(t: int) -> torch.Tensor:
        at = attrs.evolve(subject, interval=(t, t + 1))
        return denoising_losses(at, task, samples, Run().generator("batch-0")).mean()

    return loss


def by_hand(subject: Subject, slopes: dict[str, torch.Tensor]) -> torch.Tensor:
    """Closed units' weights, one channel and one weight at a time, from the anatomy's slices."""
    values = torch.zeros(len(subject.anatomy.units), dtype=torch.float64)
    terms = {
        name: (weight.detach() * slopes[name]).abs()
        for name, weight in subject.denoiser.named_parameters()
    }
    for index, unit in enumerate(subject.anatomy.units):
        layer = subject.anatomy.layer(unit.layer)
        if unit.width is None:
            values[index] = sum(
                term.sum()
                for name, term in terms.items()
                if name.startswith(tuple(f"{path}." for path in layer.modules))
                and name.endswith(".weight")
                and "norm" not in name
                and not (layer.shortcut and name.startswith(layer.shortcut))
            )
            continue
        width = subject.anatomy.widths[unit.width]
        for place in width.slices:
            if "norm" in place.module:
                continue
            term = terms[f"{place.module}.weight"]
            for block in range(place.blocks):
                first = (block * width.count + unit.position) * width.size
                channels = range(first, first + width.size)
                parts = (term[c] if place.side == "out" else term[:, c] for c in channels)
                values[index] += sum(part.sum() for part in parts)
    return values


def slopes_of(subject: Subject, losses: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    names, weights = zip(*subject.denoiser.named_parameters(), strict=True)
    found = torch.autograd.grad(torch.stack(list(losses)).sum(), weights)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("kind", ["plain", "scale-shift", "three-stages"])
def test_diff_pruning_sums_each_weights_slopes_over_the_timesteps_first(
    kind: str, scheduler: Any, task: moediff.Task
) -> None:
    subject = moediff.installed().dissect(tiny_unet(kind), scheduler)
    subject, task = doubled(subject, task, 100, 900)
    scorer = DiffPruning(threshold=0.0, samples=2, stride=300, by_interval=True)
    values, run = walk(scorer, subject, task)
    assert run.records["free/timesteps"].tolist() == [100, 400, 700]
    losses = [losses_at(subject, task, 2)(t) for t in (100, 400, 700)]
    wanted = by_hand(subject, slopes_of(subject, losses))
    torch.testing.assert_close(values, wanted, rtol=1e-9, atol=1e-15)
    found = run.records["free/losses"].tolist()
    assert found == pytest.approx([loss.item() for loss in losses], rel=1e-6)
    # Absolute values timestep by timestep would be another, larger score.
    again = [losses_at(subject, task, 2)(t) for t in (100, 400, 700)]
    apart = torch.stack([by_hand(subject, slopes_of(subject, [loss])) for loss in again]).sum(0)
    assert (apart > values * (1 + 1e-6)).all()


@pytest.fixture
def falling(task: moediff.Task) -> tuple[Subject, moediff.Task]:
    """A loss that falls with t: dark images, of which v-prediction asks ever less."""
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    subject = moediff.installed().dissect(tiny_unet(), scheduler)
    with torch.no_grad():
        subject.denoiser.conv_out.weight *= 0.1
        subject.denoiser.conv_out.bias *= 0.1
    task = attrs.evolve(task, samples=task.samples * 0.1)
    return doubled(subject, task, 0, 1000)


def test_diff_pruning_stops_where_the_loss_falls_under_the_share(
    falling: tuple[Subject, moediff.Task],
) -> None:
    subject, task = falling
    settings: dict[str, Any] = {"samples": 2, "stride": 100}
    everything, run = walk(DiffPruning(threshold=0.0, **settings), subject, task)
    losses = run.records["free/losses"]
    assert len(losses) == 10
    assert (losses.diff() < 0).all()
    for wanted in (3, 6):
        share = float((losses[wanted - 1] + losses[wanted]) / 2 / losses[0])
        values, run = walk(DiffPruning(threshold=share, **settings), subject, task)
        # From t = 0 up, and the timestep that ends the walk is seen but does not count.
        assert run.records["free/timesteps"].tolist() == list(range(0, 100 * wanted + 1, 100))
        parts = [losses_at(subject, task, 2)(100 * k) for k in range(wanted)]
        hand = by_hand(subject, slopes_of(subject, parts))
        torch.testing.assert_close(values, hand, rtol=1e-9, atol=1e-15)
        assert not torch.allclose(values, everything, rtol=1e-3)


def test_diff_pruning_compares_with_the_largest_loss_of_its_own_interval(
    falling: tuple[Subject, moediff.Task],
) -> None:
    subject, task = falling
    _, run = walk(DiffPruning(threshold=0.0, samples=2, stride=100), subject, task)
    losses = run.records["free/losses"]
    share = float((losses[6] + losses[7]) / 2 / losses[5])
    late = attrs.evolve(subject, interval=(500, 1000))
    scorer = DiffPruning(threshold=share, samples=2, stride=100, by_interval=True)
    assert scorer.needs == {"intervals"}
    assert walk(scorer, late, task)[1].records["free/timesteps"].tolist() == [500, 600, 700]
    scorer = attrs.evolve(scorer, threshold=float(share * losses[5] / losses[0]))
    assert len(walk(scorer, subject, task)[1].records["free/timesteps"]) == 8


def test_diff_pruning_at_one_timestep_has_taylors_slopes(
    subject: Subject, task: moediff.Task
) -> None:
    """Of what a unit's consumer reads, the signed terms w dL/dw add up to the mask's slope."""
    subject, task = doubled(subject, task, 417, 418)
    run = Run()
    taylor = Taylor(samples=1, batch=1).score(subject, task, run).values
    weights = dict(subject.denoiser.named_parameters())
    loss, slopes = DiffPruning(samples=1)._slopes(subject, list(weights.values()), 417, task, run)
    assert loss == pytest.approx(losses_at(subject, task, 1)(417).item(), rel=1e-12)
    found = dict(zip(weights, slopes, strict=True))
    values = DiffPruning(samples=1, by_interval=True).score(subject, task, run).values
    for name, width in subject.anatomy.widths.items():
        (place,) = (p for p in width.slices if p.side == "in")
        term = weights[f"{place.module}.weight"] * found[f"{place.module}.weight"]
        signed = term.detach().transpose(0, 1).reshape(width.count, -1).sum(1).abs()
        span = subject.anatomy.spans[name]
        torch.testing.assert_close(signed, taylor[span], rtol=1e-9, atol=1e-15)
        assert (values[span] >= signed).all()


def test_diff_pruning_keeps_its_samples_unless_it_redraws(
    subject: Subject, task: moediff.Task
) -> None:
    seen: list[torch.Tensor] = []
    handle = subject.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for redraw in (False, True):
        seen.clear()
        settings: dict[str, Any] = {"samples": 5, "batch": 3, "stride": 499, "threshold": 0.0}
        DiffPruning(redraw=redraw, **settings).score(
            attrs.evolve(subject, scheduler=Clean()), task, Run()
        )
        assert [len(rows) for rows in seen] == [3, 2] * 3  # t = 0, 499, 998
        assert torch.equal(seen[0], seen[2]) != redraw
        assert torch.equal(seen[1], seen[5]) != redraw
        assert not torch.equal(seen[0][:2], seen[1])
    handle.remove()


class Clean(DDPMScheduler):
    """Adds the same noise at every timestep, so that only another draw makes another input."""

    def add_noise(self, clean: Any, noise: Any, timesteps: Any) -> Any:
        return clean + noise


def test_diff_pruning_resumes_where_it_was_killed(
    subject: Subject, task: moediff.Task, tmp_path: Path
) -> None:
    subject, task = doubled(subject, task, 0, 1000)
    scorer = DiffPruning(threshold=0.0, samples=2, stride=200, save_every=2)
    whole = Run()
    wanted = staged(whole, scorer, subject, task)
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt

    handle = subject.denoiser.register_forward_pre_hook(count)
    with pytest.raises(KeyboardInterrupt):
        staged(Run(cache=tmp_path), scorer, subject, task)
    resumed = Run(cache=tmp_path)
    found = staged(resumed, scorer, subject, task)
    handle.remove()
    assert calls[0] == 4 + 3  # two of five timesteps were not walked again
    assert torch.equal(found.values, wanted.values)
    assert resumed.ledger["scores"].samples == whole.ledger["scores"].samples == 10
    for name, record in whole.records.items():
        assert torch.equal(resumed.records[name], record)


def test_diff_pruning_gives_frozen_weights_nothing(subject: Subject, task: moediff.Task) -> None:
    name, width = next(iter(subject.anatomy.widths.items()))
    for place in width.slices:
        subject.denoiser.get_submodule(place.module).requires_grad_(False)
    values = DiffPruning(samples=2, stride=500).score(subject, task, Run()).values
    assert torch.equal(values[subject.anatomy.spans[name]], torch.zeros(width.count).double())
    assert values.max() > 0


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_diff_pruning_takes_a_share(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        DiffPruning(threshold=threshold)
