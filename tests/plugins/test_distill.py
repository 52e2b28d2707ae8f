"""Distillation: what the full model teaches with, and that nothing of it is sampled later."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import moediff
from moediff.anatomy import Anatomy
from moediff.denoising import denoising_loss
from moediff.errors import ArtefactError, DataError, MoediffError, OptionError, UnknownNameError
from moediff.recipefile import recipe_from_tables
from moediff.sampling import Sampling, generate, initial_noise, predict
from moediff.workdir import Run
from moediff_plugins.tuners.distill import Distill
from moediff_plugins.tuners.teacher import SAMPLED, SEEDS, _check_seeds, teacher_task
from tests.conftest import tiny_unet
from tests.plugins.tuning import FAST, TINY, build, colours, weights


@pytest.fixture
def task() -> moediff.Task:
    return colours()


class Calls:
    """Counts a denoiser's calls, and stops the one after `limit` as a kill would."""

    def __init__(self, denoiser: Any) -> None:
        self.count, self.limit = 0, 10**9

        def called(*_: Any) -> None:  # copies of the denoiser carry it along: all calls count
            self.count += 1
            if self.count > self.limit:
                raise KeyboardInterrupt

        denoiser.conv_out.register_forward_hook(called)

    def of(self, work: Any, limit: int = 10**9) -> int:
        self.count, self.limit = 0, limit
        if limit < 10**9:
            with pytest.raises(KeyboardInterrupt):
                work()
        else:
            work()
        return self.count


# ------------------------------------------------------------------------------------- its images


@pytest.mark.parametrize("own", [False, True])
def test_the_teacher_s_images_have_seeds_of_their_own(
    subject: moediff.Subject, task: moediff.Task, own: bool
):
    sampling = Sampling(steps=2, seed=3)
    given = Sampling(steps=3, seed=4) if own else None
    run = Run(sampling=sampling)
    data = teacher_task(task, subject, given, 5, 2, run)
    start = (4 if own else 3) * 1_000_003 + 2**31
    seeds = [start + k for k in range(5)]
    with torch.no_grad():
        expected = generate(
            subject.denoiser,
            subject.scheduler,
            given or sampling,
            initial_noise(seeds, (3, 8, 8)),
            {},
            {},
            seeds,
        )
    assert torch.allclose(data.samples, expected, atol=1e-5)
    assert run.ledger["teacher-images"].samples == 5 * (3 if own else 2)
    # A CPU generator reads the low 32 bits, so being different integers is not enough.
    noise = initial_noise(seeds, (3, 8, 8))
    sampled = initial_noise(sampling.seeds(1000), (3, 8, 8))
    assert torch.cdist(noise.flatten(1), sampled.flatten(1)).min() > 1


@given(
    seed=st.integers(0, 10_000),
    offset=st.one_of(st.integers(-2000, 2000), st.integers(SAMPLED - 2000, SAMPLED + 2000)),
    turns=st.integers(0, 2),
    count=st.integers(1, 1000),
)
def test_seeds_are_refused_exactly_if_one_is_sampled(
    seed: int, offset: int, turns: int, count: int
):
    run, kept = Run(sampling=Sampling(seed=seed)), seed * SAMPLED
    first = kept + offset + turns * SEEDS
    read = (first + np.arange(count)) % SEEDS  # what the generators make of them
    if ((read - kept) % SEEDS < SAMPLED).any():
        with pytest.raises(OptionError, match=rf"another seed, such as {seed},"):
            _check_seeds(first, count, run)
    else:
        _check_seeds(first, count, run)


def test_a_sampling_may_have_any_seed_but_one_half_of_all_seeds_away(
    subject: moediff.Subject, task: moediff.Task
):
    run = Run(sampling=Sampling(steps=2, seed=3))
    before = weights(subject.denoiser)
    for sampling in (Sampling(steps=2, seed=2151), {"steps": 2, "seed": 2151}):
        with pytest.raises(OptionError, match=r"4 images .* \(seed 3\) draws"):
            Distill(steps=2, images=4, sampling=sampling, **TINY).recover(
                build(subject), task, subject, run
            )
    mixture = build(subject)
    for options in (
        {"images": 4, "sampling": {"steps": 2, "seed": 3}},
        {"images": 0, "sampling": {"seed": 2151}},
    ):
        Distill(steps=2, **options, **TINY).recover(mixture, task, subject, run)
    assert all(torch.equal(before[k], v) for k, v in subject.denoiser.state_dict().items())


@given(seed=st.integers(0, 2000), own=st.integers(0, 2000), measured=st.integers(0, 2000))
def test_no_measurement_draws_what_the_teacher_drew(seed: int, own: int, measured: int):
    for sampling in (Sampling(seed=seed), Sampling(seed=own)):
        first = sampling.seeds(1)[0] + SEEDS // 2
        _check_seeds(first, 1000, Run(sampling=Sampling(seed=measured)))


def test_a_guided_teacher_keeps_the_labels(scheduler: Any):
    base = moediff.installed().dissect(tiny_unet("class-conditional"), scheduler)
    images = np.zeros((6, 8, 8, 3), np.float32)
    task = moediff.Task.from_arrays(images, [0, 1, 2, 0, 1, 2], null_label=3)
    run = Run(sampling=Sampling(steps=2, guidance=2.0))
    data = teacher_task(task, base, None, 6, 4, run)
    assert data.conditioning["class_labels"].tolist() == [0, 0, 1, 1, 2, 2]
    assert data.null is task.null
    assert run.ledger["teacher-images"].samples == 6 * 2 * 2
    mixture = build(base)
    Distill(steps=2, images=6, **TINY).recover(mixture, task, base, run)
    assert run.records["free/loss-own"].shape == (1,)


def test_images_that_are_not_finite_are_refused(subject: moediff.Subject, task: moediff.Task):
    nn.init.constant_(subject.denoiser.conv_out.bias, math.inf)
    run = Run(sampling=Sampling(steps=2))
    with pytest.raises(MoediffError, match=r"images 0 to 1 came out NaN.*images=0"):
        Distill(images=3, batch=2).recover(build(subject), task, subject, run)


# --------------------------------------------------------------------------- stored once and reused


def recover(tuner: Distill, subject: moediff.Subject, task: moediff.Task, run: Run) -> Any:
    """One recovery as the engine runs it: a stage that depends on the tuner."""

    def work() -> tuple[dict[str, torch.Tensor], None]:
        return weights(tuner.recover(build(subject, 1), task, subject, run)), None

    return run.stage("recover", [tuner], work, lambda packed: packed, lambda *packed: packed)


def test_images_are_made_and_phases_finished_once(
    subject: moediff.Subject, task: moediff.Task, tmp_path: Path
):
    tuner, calls = Distill(steps=3, images=4, **TINY), Calls(subject.denoiser)
    for folder, last, expected in [("a", 3, 4), ("a", 7, 8), ("a", 10**9, 2), ("b", 10**9, 10)]:
        # 2 batches of 2 calls make the images; 3 steps ask teacher and mixture once each. The
        # second kill comes after the tied phase (2 steps), so only the last step is left.
        run = Run(cache=tmp_path / folder, sampling=Sampling(steps=2))
        assert calls.of(lambda run=run: recover(tuner, subject, task, run), last) == expected
        assert len(list((tmp_path / folder).glob("teacher-images-*.safetensors"))) == (last != 3)
    one, other = (
        sorted((tmp_path / x).glob("teacher-images-*"))[0].read_bytes()[-4 * 768 :] for x in "ab"
    )
    assert one == other  # 4 images of 3 x 8 x 8 in float32, killed in between or not


def test_another_learning_rate_does_not_generate_again(
    subject: moediff.Subject, task: moediff.Task, tmp_path: Path
):
    calls = Calls(subject.denoiser)
    tuner = Distill(steps=2, images=4, **TINY)
    other_samples = attrs.evolve(task, samples=-task.samples, drop_conditioning=0.3)

    def again(
        tuner: Distill, task: moediff.Task = task, run_seed: int = 0, **changes: Any
    ) -> tuple[int, int]:
        run = Run(cache=tmp_path, sampling=Sampling(steps=2, **changes), seed=run_seed)
        made = calls.of(lambda: recover(tuner, subject, task, run))
        assert run.ledger["teacher-images"].samples == tuner.images * 2  # what they cost, once
        return made, len(list(tmp_path.glob("teacher-images-*.safetensors")))

    assert again(tuner) == (4 + 4, 1)  # 2 batches of 2 calls; 2 steps with 2 calls each
    for other in (
        attrs.evolve(tuner, learning_rate=1e-2),
        attrs.evolve(tuner, mix=0.5, ema=0.0, precision="bf16"),
    ):
        assert again(other)[1] == 1
        assert calls.count == 4 + 2 * (other.mix > 0)
    assert again(attrs.evolve(tuner, learning_rate=0.1), other_samples) == (4, 1)
    assert again(attrs.evolve(tuner, learning_rate=0.2), run_seed=1) == (4, 1)
    assert again(attrs.evolve(tuner, images=3)) == (4 + 4, 2)
    assert again(attrs.evolve(tuner, batch=4)) == (2 + 4, 3)
    assert again(tuner, seed=1) == (0, 3)  # the stage `recover` of this test was stored
    assert again(attrs.evolve(tuner, clip=2.0), seed=1) == (4 + 4, 4)
    with torch.no_grad():
        subject.denoiser.conv_in.bias += 0.1
    assert again(attrs.evolve(tuner, clip=3.0)) == (4 + 4, 5)


def test_images_depend_on_prompts_and_on_the_null_if_they_are_guided(
    scheduler: Any, tmp_path: Path
):
    base = moediff.installed().dissect(tiny_unet("class-conditional"), scheduler)
    images = np.zeros((4, 8, 8, 3), np.float32)

    def files(guidance: float, labels: list[int], null: int) -> int:
        task = moediff.Task.from_arrays(images, labels, null_label=null)
        run = Run(cache=tmp_path, sampling=Sampling(steps=1, guidance=guidance))
        teacher_task(task, base, None, 4, 4, run)
        return len(list(tmp_path.glob("teacher-images-*.safetensors")))

    first, other = [0, 0, 1, 1], [0, 1, 1, 1]
    assert [files(1.0, *rest) for rest in ((first, 2), (first, 3), (other, 3))] == [1, 1, 2]
    assert [files(2.0, *rest) for rest in ((first, 2), (first, 3), (first, 2))] == [3, 4, 4]


def test_stored_images_that_were_altered_are_refused(
    subject: moediff.Subject, task: moediff.Task, tmp_path: Path
):
    run = Run(cache=tmp_path, sampling=Sampling(steps=2))
    teacher_task(task, subject, None, 2, 2, run)
    (file,) = tmp_path.glob("teacher-images-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"Delete the file `teacher-images-"):
        teacher_task(task, subject, None, 2, 2, run)


# ------------------------------------------------------------------------------------------ recipes


def test_a_sampling_goes_through_recipes_and_back(tmp_path: Path):
    file = tmp_path / "recipe.toml"
    file.write_text(
        'base = "moedm"\n[recover]\nsteps = 7\n[recover.sampling]\nscheduler = "heun"\nseed = 9\n'
    )
    recipe = moediff.load_recipe(file)
    assert recipe.recover == Distill(steps=7, sampling=Sampling("heun", seed=9))
    for whole in (recipe, moediff.load_recipe("moedm")):
        tables = json.loads(json.dumps(whole.to_tables()))
        assert recipe_from_tables(tables) == whole
    file.write_text('base = "moedm"\n[recover.sampling]\nstep = 9\n')
    with pytest.raises(
        UnknownNameError, match=r"sampling: unknown key 'step'\. Did you mean 'steps'"
    ):
        moediff.load_recipe(file)
    file.write_text('base = "moedm"\n[recover.sampling]\nsteps = 0\n')
    with pytest.raises(OptionError, match="distill: 'steps' must be >= 1"):
        moediff.load_recipe(file)


# ------------------------------------------------------------------------------------------ prompts

TEXT = "encoder_hidden_states"


def text_task(rows: int = 6, held: int | None = 3) -> moediff.Task:
    """Random images with random embeddings (2 tokens of 8 numbers), some of them held out."""
    words = torch.randn(rows + (held or 0), 2, 8, generator=torch.Generator().manual_seed(0))
    return moediff.Task(
        torch.zeros(rows, 3, 8, 8),
        {TEXT: words[:rows]},
        held_out={TEXT: words[rows:]} if held else {},
    )


def text_subject(scheduler: Any) -> moediff.Subject:
    """A text-conditional denoiser; its anatomy does not matter here."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
    return moediff.Subject(net.eval(), scheduler, Anatomy(()), (0, 1000))


def test_images_are_made_from_training_prompts_alone(scheduler: Any):
    task, subject = text_task(), text_subject(scheduler)
    seen: list[torch.Tensor] = []
    subject.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend(kwargs[TEXT]), with_kwargs=True
    )
    data = teacher_task(task, subject, None, 12, 4, Run(sampling=Sampling(steps=2)))
    assert len(seen) == 12 * 2
    distances = torch.cdist(torch.stack(seen).flatten(1), task.held_out[TEXT].flatten(1))
    assert distances.min() > 0.1
    assert torch.equal(data.conditioning[TEXT], task.conditioning[TEXT].repeat_interleave(2, 0))
    assert torch.equal(data.prompts(3)[0][TEXT], task.held_out[TEXT])


@pytest.mark.parametrize("images", [0, 4])
def test_prompts_that_are_sampled_are_not_trained_on(
    subject: moediff.Subject, images: int, scheduler: Any
):
    tuner = Distill(steps=2, images=images, **TINY)

    def refused(task: moediff.Task, message: str) -> None:
        with pytest.raises(DataError, match=message):
            tuner.recover(build(subject), task, subject, Run(sampling=Sampling(steps=2)))

    task = text_task()
    common = torch.cat([task.held_out[TEXT], task.conditioning[TEXT][4:5]])
    refused(attrs.evolve(task, held_out={TEXT: common}), rf"{TEXT}: 1 of the rows .* too\. ")
    half = attrs.evolve(task, held_out={TEXT: common.double()})
    refused(half, "1 of the rows")  # the same prompt in another type
    refused(text_task(held=None), r"6 of the rows .*, as the task has no `held_out` rows")
    extra = attrs.evolve(task, conditioning={TEXT: task.held_out[TEXT]}, held_out={})
    refused(attrs.evolve(task, extra=extra, extra_share=0.5), "3 of the rows")


def test_class_labels_and_integers_are_the_same_words_for_both(scheduler: Any):
    base = moediff.installed().dissect(tiny_unet("class-conditional"), scheduler)
    labels = torch.arange(4)
    task = moediff.Task(torch.zeros(4, 3, 8, 8), {"class_labels": labels})
    task = attrs.evolve(task, held_out={"class_labels": labels})
    run = Run(sampling=Sampling(steps=2))
    Distill(steps=2, images=4, **TINY).recover(build(base), task, base, run)
    assert len(run.records["free/loss-own"]) == 1


# ----------------------------------------------------------------------- extra, variance, precision


@pytest.mark.parametrize("images", [0, 4])
def test_extra_rows_are_in_every_batch_as_real_images(
    subject: moediff.Subject, task: moediff.Task, images: int
):
    # So bright that no noise hides them: sqrt(alpha_bar) 1e4 is 63 at the last timestep.
    extra = attrs.evolve(task, samples=torch.full((3, 3, 8, 8), 1e4))
    mixed = attrs.evolve(task, extra=extra, extra_share=3 / 8)
    bright: list[int] = []
    mixture = build(subject)  # its copies would carry the hook along
    subject.denoiser.register_forward_pre_hook(
        lambda _, args: bright.append(int((args[0].flatten(1).mean(1) > 30).sum()))
    )
    run = Run(sampling=Sampling(steps=2))
    tuner = Distill(steps=4, images=images, **FAST)
    tuner.recover(mixture, mixed, subject, run)
    assert bright == [0, 0] * (images > 0) + [3] * 4


def test_eq_3_compares_the_learned_variance_too(scheduler: Any, task: moediff.Task):
    teacher = moediff.installed().dissect(tiny_unet(out_channels=6), scheduler)
    stranger = attrs.evolve(teacher, denoiser=tiny_unet(seed=1, out_channels=6))
    generator = torch.Generator().manual_seed(7)
    noisy = torch.randn(64, 3, 8, 8, generator=generator)
    times = torch.randint(0, 1000, (64,), generator=generator)

    def gaps(mixture: moediff.ExpertMixture) -> list[float]:
        with torch.no_grad():
            found, wanted = (
                predict(net, noisy, times, {}, whole=True) for net in (mixture, teacher.denoiser)
            )
        assert found.shape == (64, 6, 8, 8)
        return [float(half.square().mean()) for half in (found - wanted).chunk(2, 1)]

    mixture = build(stranger)
    before = gaps(mixture)
    run = Run(sampling=Sampling(steps=2))
    Distill(steps=60, images=6, **FAST).recover(mixture, task, teacher, run)
    assert all(new < 0.6 * old for new, old in zip(gaps(mixture), before, strict=True))


def test_the_denoising_loss_leaves_the_variance_alone(scheduler: Any, task: moediff.Task):
    teacher = moediff.installed().dissect(tiny_unet(out_channels=6), scheduler)
    mixture = build(teacher)
    before = mixture.experts[0].conv_out.weight.detach().clone()
    batch = task.batch(4, torch.Generator().manual_seed(0))
    times = torch.tensor([1, 200, 600, 999])
    loss = denoising_loss(mixture, scheduler, batch, times, torch.Generator().manual_seed(1))
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    output = mixture(scheduler.add_noise(batch.clean, noise, times), times).sample
    torch.testing.assert_close(loss, (output[:, :3] - noise).square().mean())
    Distill(steps=6, mix=1.0, tied_share=1.0, **TINY).recover(mixture, task, teacher, Run())
    moved = (mixture.experts[0].conv_out.weight != before).flatten(1).any(1)
    assert moved.tolist() == [True] * 3 + [False] * 3
