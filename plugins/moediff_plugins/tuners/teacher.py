"""What the full model teaches with: images made once, and nothing that is sampled later."""

from __future__ import annotations

from importlib.metadata import version

import attrs
import torch

from moediff.errors import ArtefactError, DataError, OptionError
from moediff.sampling import Conditioning, Sampling, generate, initial_noise
from moediff.storage import Tensors, fingerprint, settings
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run

SEEDS = 2**32
"""How many seeds differ: a CPU generator reads the low 32 bits."""

SAMPLED = 1_000_003
"""The seeds that are kept for the recipe's sampling, the first of `Sampling.seeds`."""


def teacher_task(
    task: Task, teacher: Subject, sampling: Sampling | None, count: int, batch: int, run: Run
) -> Task:
    """The task with images of the full model in place of its own samples.

    They are a stage of their own, `teacher-images`, stored under a hash of what they depend on
    (the full model, its schedule, sampling, prompts, `count` and `batch`). Whatever else changes in
    a recipe, the run's seed too, another run with the same cache reads them again; a run that is
    killed goes on after the last batch.

    Args:
        task: its training prompts are generated; `extra` stays as it is.
        teacher: the full model.
        sampling: how; None is the recipe's. Its seeds are moved by half of all seeds, away from
            those that the recipe's sampling, or a measurement with a seed of its own, draws.
        count: how many images.
        batch: images per batch of generation.
        run: the run.

    Raises:
        OptionError: a seed is one that is kept for the recipe's sampling.
        DataError: an image came out NaN or infinite.
        ArtefactError: stored images are not those that were stored.
    """
    how = sampling or run.sampling
    first = how.seeds(1)[0] + SEEDS // 2
    _check_seeds(first, count, run)
    chosen, null = task.prompts(count, training=True)
    depends = (
        version("moediff"), teacher.denoiser, settings(teacher.scheduler.config),
        how, first, count, batch, chosen, null if how.guidance != 1 else {},
    )  # fmt: skip
    images = run.stage(
        "teacher-images",
        depends,
        lambda: _generate(teacher, how, range(first, first + count), batch, chosen, null, run),
        pack=lambda made: ({"images": made}, fingerprint(made)),
        unpack=_checked,
        seeded=False,
    )
    return attrs.evolve(task, samples=images, conditioning=chosen)


def check_prompts(task: Task) -> None:
    """Refuse to train on prompts that are sampled. A class label is the same word for both.

    Raises:
        DataError: a row of a floating-point keyword is both.
    """
    trained = [task.conditioning, *([task.extra.conditioning] if task.extra is not None else [])]
    for name, rows in (task.held_out or task.conditioning).items():
        if name == "class_labels" or not rows.is_floating_point():
            continue
        sampled = {_row(row) for row in rows}
        common = sum(_row(row) in sampled for words in trained for row in words.get(name, ()))
        if common:
            raise DataError(
                f"{name}: {common} of the rows to train on are sampled too"
                f"{'' if task.held_out else ', as the task has no `held_out` rows'}. Prompts of "
                "training and sampling must be disjoint: give the task other `held_out` rows "
                "(`split_prompts` divides a list of prompts). What only describes a prompt, such "
                "as a mask, is exempt if its type is integer or bool."
            )


def _row(row: torch.Tensor) -> str:
    return fingerprint(row.float() + 0.0)  # -0.0 is 0.0


def _check_seeds(first: int, count: int, run: Run) -> None:
    kept = run.sampling.seeds(1)[0]
    # Two arcs of the circle of seeds meet where one starts within the other.
    if (first - kept) % SEEDS < SAMPLED or (kept - first) % SEEDS < count:
        raise OptionError(
            f"sampling: the full model's {count} images would start from seeds that the recipe's "
            f"sampling (seed {run.sampling.seed}) draws, so images to be trained on would be "
            f"sampled again. Give it another seed, such as {run.sampling.seed}, whose seeds here "
            "are half of all seeds away."
        )


def _generate(
    teacher: Subject,
    sampling: Sampling,
    seeds: range,
    batch: int,
    chosen: Conditioning,
    null: Conditioning,
    run: Run,
) -> torch.Tensor:
    """One image per seed (n, C, H, W)."""
    calls = sum(sampling.calls(teacher.scheduler, Intervals((0, teacher.total))))
    checkpoint = run.checkpoint("batches")
    saved = checkpoint.load()
    images = saved[0]["images"] if saved else torch.empty(0, *teacher.shape)
    run.spend(samples=len(images) * calls)
    for start in run.progress(range(len(images), len(seeds), batch), "teacher images"):
        rows = slice(start, min(start + batch, len(seeds)))
        noise = initial_noise(seeds[rows], teacher.shape).to(teacher.device)
        asked, free = (
            {name: value[rows].to(teacher.device) for name, value in words.items()}
            for words in (chosen, null)
        )
        with torch.no_grad():
            made = generate(
                teacher.denoiser, teacher.scheduler, sampling, noise, asked, free, seeds[rows]
            )
        if not torch.isfinite(made).all():
            raise DataError(
                f"teacher: one of the images {start} to {rows.stop - 1} came out NaN or "
                "infinite. Change the sampling, or use the task's own images (images=0)."
            )
        images = torch.cat([images, made.float().cpu()])
        run.spend(samples=len(made) * calls)
        checkpoint.save({"images": images}, None)
    return images


def _checked(tensors: Tensors, digest: str) -> torch.Tensor:
    if fingerprint(tensors["images"]) != digest:
        raise ArtefactError(
            "teacher-images: the stored images are not those that were stored. Delete the file "
            "`teacher-images-*.safetensors` among the stages and run again."
        )
    return tensors["images"]
