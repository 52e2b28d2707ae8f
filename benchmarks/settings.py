"""What every experiment starts from: a base model, the user's task, and how much work is done.

The scripts of the papers' tables share one command line: `--on digits`, `--on cifar --data
FOLDER`, or `--on own --model FOLDER --images FOLDER` for a model and images of one's own; `--device
cuda` has larger batches, and is sized for one GPU in under ten minutes, which nobody has measured
yet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

import moediff
from moediff import Blueprint, Intervals, Plan, Sampling, Subject, Task
from moediff.modelfile import load_model
from moediff.storage import fingerprint
from moediff_plugins import digits

SEEDS = (0, 1, 2)

EFFORT = 2
"""DiffPruning spreads its steps over four stages, so a row has more than in MoEDM's tables."""

DIVISOR = {"digits": 1, "cifar": 2, "own": 2}
"""Where steps are dear, DiffPruning's have smaller batches: twice the steps at the same cost."""


@attrs.frozen(eq=False)
class Setting:
    """A base model, the user's task, the images to compare with, and how much work is done.

    Attributes:
        name: of the base model's images.
        subject: the base model.
        task: the images to train on.
        reference: the images that generated ones are compared with.
        unseen: images that nothing was trained on, for the loss; one's own are not divided, so
            there these are the task's.
        extractor: whose features the distances use.
        steps: optimiser steps of every trained row.
        batch: images per step.
        rate: learning rate.
        samples: generated images per measurement.
        teacher: images that the base generates for distillation.
        noises: images that every ablation is judged on.
        aligned: images per timestep whose gradients are compared.
        stride: timesteps from one that `diff-pruning` walks to to the next.
        sampling: how images are generated.
        pretraining: optimiser batches that the base took, in words; empty where nobody knows.
        folder: where trained models and measurements are kept.
        options: the command line.
    """

    name: str
    subject: Subject
    task: Task
    reference: Task
    unseen: Task
    extractor: str
    steps: int
    batch: int
    rate: float
    samples: int
    teacher: int
    noises: int
    aligned: int
    stride: int
    sampling: Sampling
    pretraining: str
    folder: Path
    options: argparse.Namespace

    @property
    def key(self) -> str:
        """What all figures depend on: the base model, the images, and how much work is done."""
        left_out = ("subject", "unseen", "pretraining", "folder", "options")
        fields = [name.name for name in attrs.fields(Setting) if name.name not in left_out]
        return fingerprint(self.subject.denoiser, [getattr(self, name) for name in fields])

    @property
    def cache(self) -> Path:
        """Where stages and features are kept, so that tables make what they share once."""
        return self.folder.with_name(f"shared-{self.name}-{self.options.device}")

    @property
    def whole(self) -> Plan:
        """The base model itself, as a plan."""
        return Plan(Intervals.uniform(self.subject.total, 1), (Blueprint(),))

    @property
    def precision(self) -> str:
        """What losses are computed in: bfloat16 on a GPU, which is made for it."""
        return "full" if self.options.device == "cpu" else "bf16"

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of every row."""
        return SEEDS[:1] if self.options.quick else SEEDS


def parse_args(
    summary: str, bases: Sequence[str] = ("digits", "cifar", "own")
) -> argparse.Namespace:
    """Read the command line that all scripts share; `bases` are the base models that suit one."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--on", choices=bases, default=bases[0])
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of cifar10_jpeg.npz and pets32.npz, or of an extractor's weights",
    )
    if "own" in bases:
        parser.add_argument("--model", type=Path, help="own: folder with unet/ and scheduler/")
        parser.add_argument("--images", type=Path, help="own: folder or .npz of the task's images")
        parser.add_argument("--extractor", default="inception", help="own: of the distances")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for larger sizes")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.on == "cifar" and options.data is None:
        parser.error("--on cifar needs --data FOLDER, the folder that holds cifar10_jpeg.npz")
    if options.on == "own" and (options.model is None or options.images is None):
        parser.error(
            "--on own needs --model FOLDER, a saved pipeline, and --images FOLDER, images of the "
            "task in one sub-folder per class or flat"
        )
    return options


def load(
    options: argparse.Namespace, name: str, classes: Sequence[int] = (), effort: float = 1
) -> Setting:
    """Load the base model and the task.

    Args:
        options: from `parse_args`.
        name: of the experiment, for its folder under `--runs`.
        classes: class numbers of the task; by default 3 and 8 of the digits, cats and dogs of
            the photographs, all of one's own images.
        effort: how many times the usual optimiser steps a row has.
    """
    base = {"digits": _digits, "cifar": _cifar, "own": _own}[options.on](options, classes)
    batch, sizes = base.batch, base.sizes
    if options.device != "cpu":
        batch, sizes = 4 * batch, (500, 2000, 1000, 8, 1024, 10)
    if options.quick:
        batch, sizes = 8, (4, 16, 8, 1, 8, 100)
    steps, samples, teacher, noises, aligned, stride = sizes
    return Setting(
        name=options.on,
        subject=moediff.installed().dissect(base.denoiser.to(options.device), base.scheduler),
        task=base.task,
        reference=base.reference,
        unseen=base.unseen,
        extractor=base.extractor,
        steps=round(effort * steps),
        batch=batch,
        rate=base.rate,
        samples=samples,
        teacher=teacher,
        noises=noises,
        aligned=aligned,
        stride=stride,
        sampling=Sampling("ddim", 4 if options.quick else 20),
        pretraining=base.pretraining,
        folder=options.runs / f"{name}-{options.on}-{options.device}",
        options=options,
    )


def whole_task(options: argparse.Namespace, name: str, effort: float = EFFORT) -> Setting:
    """The setting of DiffPruning's tables: the base's own task, all of it.

    Images are compared with real ones that nothing was trained on. The 290 threes and eights of
    MoEDM's tables would not do: 800 batches of them raise the base's loss on other images by a
    quarter (see `expansion`), and a distance to images that were trained on takes that for a gain.

    Args:
        options: the command line.
        name: of the experiment.
        effort: see `load`.
    """
    classes = () if options.on == "own" else range(10)
    on = load(options, name, classes, effort)
    return attrs.evolve(on, reference=on.unseen, batch=on.batch // DIVISOR[options.on])


@attrs.frozen(eq=False)
class _Base:
    """What depends on the base model.

    `sizes` are steps, samples, teacher, noises, aligned and stride of `Setting`.
    """

    denoiser: Any
    scheduler: Any
    task: Task
    reference: Task
    unseen: Task
    extractor: str
    rate: float
    batch: int
    sizes: tuple[int, ...]
    pretraining: str


def _digits(options: argparse.Namespace, classes: Sequence[int]) -> _Base:
    task, reference, unseen = (
        Task.from_arrays(*digits.load_images(split), null_label=digits.NULL_LABEL).subset(
            classes or (3, 8)
        )
        for split in ("train", "all", "test")
    )
    card = _card(digits.ASSETS)["base"]
    took = f"{card['exported_step']:,} of {card['batch_size']} images"
    sizes = (800, 500, 400, 4, 1024, 1)
    return _Base(*digits.load_base(), task, reference, unseen, "digits", 5e-4, 64, sizes, took)


def _cifar(options: argparse.Namespace, classes: Sequence[int]) -> _Base:
    from benchmarks import cifar

    names = [cifar.CLASSES[label] for label in classes or (3, 5)]
    task, test = (cifar.load_images(options.data, split, names) for split in ("train", "test"))
    card = _card(cifar.ASSETS)
    took = f"{card['steps']:,} of {card['batch']} images"
    sizes = (300, 500, 200, 2, 128, 10)
    return _Base(*cifar.load_base(), task, test, test, "squeezenet", 3e-4, 32, sizes, took)


def _own(options: argparse.Namespace, classes: Sequence[int]) -> _Base:
    denoiser, scheduler = load_model(options.model)
    config = denoiser.config
    task = Task.from_folder(options.images, config.sample_size, channels=config.in_channels)
    task = task.subset(classes) if classes else task
    sizes = (300, 500, 200, 2, 128, 10)
    return _Base(denoiser, scheduler, task, task, task, options.extractor, 1e-4, 32, sizes, "")


def _card(folder: Path) -> Any:
    """What a base model's training wrote about it."""
    return json.loads((folder / "card.json").read_text(encoding="utf-8"))
