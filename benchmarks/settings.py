"""What every experiment starts from: a base model, the user's task, and how much work is done.

The scripts of the papers' tables share one command line: `--on digits`, or `--on cifar --data
FOLDER`; `--device cuda` has larger batches, and is sized for one GPU in under ten minutes, which
nobody has measured yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import attrs

import moediff
from moediff import Blueprint, Intervals, Plan, Sampling, Subject, Task
from moediff.storage import fingerprint
from moediff_plugins import digits

SEEDS = (0, 1, 2)


@attrs.frozen(eq=False)
class Setting:
    """A base model, the user's task, the images to compare with, and how much work is done.

    Attributes:
        name: of the base model's images.
        subject: the base model.
        task: the images to train on.
        reference: the images that generated ones are compared with.
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
        folder: where trained models and measurements are kept.
        options: the command line.
    """

    name: str
    subject: Subject
    task: Task
    reference: Task
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
    folder: Path
    options: argparse.Namespace

    @property
    def key(self) -> str:
        """What all figures depend on: the base model, the images, and how much work is done."""
        left_out = ("subject", "folder", "options")
        fields = [name.name for name in attrs.fields(Setting) if name.name not in left_out]
        return fingerprint(self.subject.denoiser, [getattr(self, name) for name in fields])

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


def parse_args(summary: str, bases: Sequence[str] = ("digits", "cifar")) -> argparse.Namespace:
    """Read the command line that all scripts share; `bases` are the base models that suit one."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--on", choices=bases, default=bases[0])
    parser.add_argument("--data", type=Path, help="folder of cifar10_jpeg.npz and pets32.npz")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for larger sizes")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.on == "cifar" and options.data is None:
        parser.error("--on cifar needs --data FOLDER, the folder that holds cifar10_jpeg.npz")
    return options


def load(
    options: argparse.Namespace, name: str, classes: Sequence[int] = (), effort: int = 1
) -> Setting:
    """Load the base model and the task, by default the digits 3 and 8, or cats and dogs.

    Args:
        options: from `parse_args`.
        name: of the experiment, for its folder under `--runs`.
        classes: class numbers of the task.
        effort: how many times the usual optimiser steps a row has.
    """
    if options.on == "digits":
        chosen = classes or (3, 8)
        base, scheduler = digits.load_base()
        task, reference = (
            Task.from_arrays(*digits.load_images(split), null_label=digits.NULL_LABEL)
            for split in ("train", "all")
        )
        extractor, rate, batch, sizes = "digits", 5e-4, 64, (800, 500, 400, 4, 1024, 1)
    else:
        from benchmarks import cifar

        chosen = classes or (3, 5)
        base, scheduler = cifar.load_base()
        names = [cifar.CLASSES[label] for label in chosen]
        task, reference = (
            cifar.load_images(options.data, split, names) for split in ("train", "test")
        )
        extractor, rate, batch, sizes = "squeezenet", 3e-4, 32, (300, 500, 200, 2, 128, 10)
    if options.device != "cpu":
        batch, sizes = 4 * batch, (500, 2000, 1000, 8, 1024, 10)
    if options.quick:
        batch, sizes = 8, (4, 16, 8, 1, 8, 100)
    steps, samples, teacher, noises, aligned, stride = sizes
    return Setting(
        name=options.on,
        subject=moediff.installed().dissect(base.to(options.device), scheduler),
        task=task.subset(chosen),
        reference=reference.subset(chosen),
        extractor=extractor,
        steps=effort * steps,
        batch=batch,
        rate=rate,
        samples=samples,
        teacher=teacher,
        noises=noises,
        aligned=aligned,
        stride=stride,
        sampling=Sampling("ddim", 4 if options.quick else 20),
        folder=options.runs / f"{name}-{options.on}-{options.device}",
        options=options,
    )
