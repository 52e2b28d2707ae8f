"""The bundled digits demo: a small class-conditional diffusion model and its data.

The images are scikit-learn's handwritten digits (1797 real 8x8 scans of 0..9). The assets next to
this file were made by ``examples/train_digits_base.py``; see ``assets/digits/card.json``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file
from torch import Tensor, device, nn

ASSETS = Path(__file__).resolve().parent / "assets" / "digits"
NULL_LABEL = 10
"""Class index that stands for "no class" (classifier-free guidance)."""
TEST_SHARE = 0.2
SPLIT_SEED = 0

Split = Literal["all", "train", "test"]


class DigitsClassifier(nn.Module):
    """Small conv net on 8x8 digits; its 64 penultimate features serve the distance FD[digits]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 64), nn.SiLU()),
        )
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Map images (n, 1, 8, 8) in [-1, 1] to features (n, 64)."""
        features: Tensor = self.trunk(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, 1, 8, 8) in [-1, 1] to logits (n, 10)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def load_images(split: Split = "all") -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Load the real digits: images (n, 8, 8, 1) float32 in [-1, 1] and labels (n,) int64.

    ``"test"`` is a fixed fifth of the images, which neither bundled net was trained on
    (though the base net's checkpoint was chosen by its loss there); ``"train"`` is the rest;
    ``"all"`` keeps scikit-learn's order.
    """
    if split not in ("all", "train", "test"):
        raise ValueError(f"split must be 'all', 'train' or 'test', not {split!r}")
    try:
        datasets = import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            "the digits images come with scikit-learn: pip install moediff[demo]"
        ) from error
    raw, raw_labels = datasets.load_digits(return_X_y=True)
    images = (np.asarray(raw, dtype=np.float32) / 8.0 - 1.0).reshape(-1, 8, 8, 1)
    labels = np.asarray(raw_labels, dtype=np.int64)
    if split == "all":
        return images, labels
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    cut = round(TEST_SHARE * len(images))
    chosen = order[:cut] if split == "test" else order[cut:]
    return images[chosen], labels[chosen]


def load_base() -> tuple[UNet2DModel, DDPMScheduler]:
    """Load the bundled base model (float32, eval mode) and its noise scheduler.

    The net takes noisy images (n, 1, 8, 8), timesteps (n,) and ``class_labels`` (n,) in 0..10,
    where ``NULL_LABEL`` means unconditional, and predicts the noise (n, 1, 8, 8).
    Build samplers with ``from_config(scheduler.config)``, which keeps "leading" timestep spacing:
    at the very last timestep this cosine schedule has no signal left to divide by.
    """
    unet: Any = UNet2DModel  # diffusers does not type its loaders
    ddpm: Any = DDPMScheduler
    model: UNet2DModel = unet.from_pretrained(ASSETS / "unet", local_files_only=True).float().eval()
    scheduler: DDPMScheduler = ddpm.from_pretrained(ASSETS / "scheduler", local_files_only=True)
    return model, scheduler


def load_classifier() -> DigitsClassifier:
    """Load the bundled digits classifier (float32, eval mode)."""
    with device("meta"):  # initial weights would move the global random state
        model = DigitsClassifier()
    model.load_state_dict(load_file(ASSETS / "classifier.safetensors"), assign=True)
    return model.eval()
