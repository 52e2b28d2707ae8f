"""Build, use, save and load a mixture in a minute: `python examples/quickstart.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import moediff
from moediff_plugins import digits
from moediff_plugins.tuners.distill import Distill


def main() -> None:
    """Halve the digits model for the digits 3 and 8."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args()

    denoiser, scheduler = digits.load_base()  # any UNet2DModel with its scheduler
    images, labels = digits.load_images()
    task = moediff.Task.from_arrays(images, labels).subset([3, 8])

    recipe = moediff.load_recipe(
        "moedm", scorer="magnitude", recover=Distill(steps=options.steps, images=100), budget=0.5
    )
    mixture = moediff.build_experts(denoiser, scheduler, task, recipe, verbose=True)
    mixture.save_pretrained(options.out)

    mixture = moediff.ExpertMixture.from_pretrained(options.out)
    prediction = mixture(torch.randn(1, 1, 8, 8), 700, class_labels=torch.tensor([3])).sample
    print(
        f"expert {mixture.route(700)} of {len(mixture.experts)}, output {tuple(prediction.shape)}"
    )


if __name__ == "__main__":
    main()
