"""MoEDM on the digits, component by component (Sec. 3): `python examples/moedm.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import moediff
from moediff import Budget, Recipe, Run, Sampling
from moediff_plugins import digits
from moediff_plugins.clusterers.uniform import Uniform
from moediff_plugins.counters.params import Params
from moediff_plugins.gates.one_hot import OneHot
from moediff_plugins.metrics.frechet import Frechet
from moediff_plugins.pruners.mid_layer import MidLayer
from moediff_plugins.scorers.ablation_l1 import AblationL1
from moediff_plugins.tuners.distill import Distill


def main() -> None:
    """Score by ablation, drop mid-layers, copy the rest per interval, distill."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps of both phases")
    parser.add_argument("--noises", type=int, default=4, help="images per ablation")
    parser.add_argument("--samples", type=int, default=500, help="images for FD[digits]")
    parser.add_argument("--out", type=Path, default=Path("runs/moedm"))
    options = parser.parse_args()

    denoiser, scheduler = digits.load_base()
    task = moediff.Task.from_arrays(*digits.load_images(), null_label=digits.NULL_LABEL)
    task = task.subset([3, 8])
    recipe = Recipe(
        scorer=AblationL1(images=options.noises),  # Eq. 1
        clusterer=Uniform(),
        gate=OneHot(),  # Eq. 2, two copies of every remaining layer
        pruner=MidLayer(),  # Sec. 3.2, "Discard Layers"
        budget=Budget(0.3, Params()),
        experts=2,
        recover=Distill(steps=options.steps, learning_rate=5e-4),  # Eq. 3
        sampling=Sampling("ddim", steps=10),
    )
    mixture = moediff.build_experts(denoiser, scheduler, task, recipe, options.out, verbose=True)

    for line in mixture.plan.blueprints[0].drop:
        print(f"dropped {line}")
    subject = moediff.installed().dissect(denoiser, scheduler)
    run = Run(sampling=recipe.sampling, verbose=True)
    for name, model in (("base", denoiser), ("MoEDM", mixture)):
        figure = Frechet("digits", options.samples).measure(model, subject, task, run)
        print(f"{name}: {figure.name} {figure.value:.2f} from {figure.samples} samples")


if __name__ == "__main__":
    main()
