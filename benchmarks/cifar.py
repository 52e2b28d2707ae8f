"""The colour base of the benchmarks and its data, which is not part of the project.

The data folder holds ``cifar10_jpeg.npz`` and ``pets32.npz``; scripts take it as ``--data PATH``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from examples.train_cifar_base import NULL_LABEL, load_cifar
from moediff import Task
from moediff.errors import DataError, UnknownNameError, did_you_mean

ASSETS = Path(__file__).resolve().parent / "assets" / "cifar"

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
"""CIFAR-10's classes; a class label is a place in this list."""

PETS = ("cat", "dog")
"""The classes of the pet store, the papers' example of what a user wants."""

TEST_EVERY = 6
"""Every sixth photograph of the pets is for testing."""


def load_base(folder: Path = ASSETS) -> tuple[UNet2DModel, DDPMScheduler]:
    """Load the base model (float32, eval mode) and its noise scheduler.

    The net takes noisy images (n, 3, 32, 32), timesteps (n,) and ``class_labels`` (n,) in 0..10,
    where ``NULL_LABEL`` means unconditional, and predicts the noise (n, 3, 32, 32).

    Args:
        folder: what ``examples/train_cifar_base.py --export`` wrote.

    Raises:
        DataError: nothing was exported there.
    """
    if not (folder / "unet" / "config.json").is_file():
        raise DataError(
            f"base: {folder} holds no unet/config.json. Train and export a base with "
            "examples/train_cifar_base.py, or name the folder of another one."
        )
    unet: Any = UNet2DModel  # diffusers does not type its loaders
    ddpm: Any = DDPMScheduler
    model: UNet2DModel = unet.from_pretrained(folder / "unet", local_files_only=True)
    scheduler: DDPMScheduler = ddpm.from_pretrained(folder / "scheduler", local_files_only=True)
    return model.float().eval(), scheduler


def load_images(
    folder: Path, split: Literal["train", "test"], classes: Sequence[str] = CLASSES
) -> Task:
    """Load CIFAR-10's images of some classes, labelled as the base model was trained.

    Args:
        folder: of ``cifar10_jpeg.npz``.
        split: 50,000 images to train on, or 10,000 that the base has not seen.
        classes: names from ``CLASSES``.

    Raises:
        UnknownNameError: no such class.
        DataError: the file has other classes.
    """
    for name in classes:
        if name not in CLASSES:
            raise UnknownNameError(f"classes: got {name!r}.{did_you_mean(name, CLASSES)}")
    images, labels = _decoded(folder, split)
    rows = np.isin(labels, [CLASSES.index(name) for name in classes])
    return Task.from_arrays(images.permute(0, 2, 3, 1).numpy()[rows], labels[rows], NULL_LABEL)


def load_pets(folder: Path, split: Literal["all", "train", "test"] = "all") -> Task:
    """Load the photographs of cats and dogs, labelled as CIFAR-10's cats and dogs.

    Args:
        folder: of ``pets32.npz``.
        split: all 12,000; or the 10,000 to train on; or the 2,000 to test with.

    Raises:
        DataError: the file has classes that are not CIFAR-10's.
    """
    with np.load(folder / "pets32.npz") as file:
        names = [str(name) for name in file["classes"]]
        images, labels = file["images"], file["labels"]
    if not set(names) <= set(CLASSES):
        raise DataError(f"pets: got the classes {names}; allowed are {', '.join(CLASSES)}.")
    labels = np.array([CLASSES.index(name) for name in names])[labels]
    test = np.arange(len(images)) % TEST_EVERY == 0
    rows = {"all": np.ones_like(test), "train": ~test, "test": test}[split]
    return Task.from_arrays(images[rows], labels[rows], NULL_LABEL)


@cache
def _decoded(folder: Path, split: Literal["train", "test"]) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """Images (n, 3, 32, 32), uint8, and labels (n,) of one split; decoding takes seconds."""
    with np.load(folder / "cifar10_jpeg.npz") as file:
        found = tuple(str(name) for name in file["classes"])
    if found != CLASSES:
        raise DataError(f"cifar: got the classes {found}; allowed are {CLASSES}, in this order.")
    images, labels = load_cifar(folder, split)
    return images, labels.numpy()
