"""DiffPruning on the digits, component by component (Sec. 3): `python examples/diffpruning.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import moediff
from moediff import Budget, Recipe, Run, Sampling
from moediff.storage import read_packed
from moediff_plugins import digits
from moediff_plugins.clusterers.alignment import Alignment
from moediff_plugins.counters.macs import MACs
from moediff_plugins.gates.era import ERA
from moediff_plugins.metrics.frechet import Frechet
from moediff_plugins.pruners.structural import Structural
from moediff_plugins.scorers.magnitude import Magnitude
from moediff_plugins.tuners.elastic import Elastic
from moediff_plugins.tuners.finetune import Finetune


def main() -> None:
    """Cut the timesteps, make elastic experts, let the ERA spend the budget, fine-tune."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=0.5, help="share of the base's MACs")
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps, agent aside")
    parser.add_argument("--era-steps", type=int, default=300, help="optimiser steps of the agent")
    parser.add_argument("--images", type=int, default=128, help="images per timestep's gradient")
    parser.add_argument("--samples", type=int, default=500, help="images for FD[digits]")
    parser.add_argument("--out", type=Path, default=Path("runs/diffpruning"))
    options = parser.parse_args()

    denoiser, scheduler = digits.load_base()
    task = moediff.Task.from_arrays(*digits.load_images(), null_label=digits.NULL_LABEL)
    task = task.subset([3, 8])
    quarter, rate = options.steps // 4, 5e-4
    recipe = Recipe(
        clusterer=Alignment(images=options.images),  # Supp. Eq. 1-3
        prepare=Elastic(depth_steps=quarter, width_steps=quarter, learning_rate=rate),  # Eq. 4-5
        scorer=Magnitude(),  # Sec. 3.4, the order in which units are dropped
        gate=ERA(steps=options.era_steps),  # Eq. 6-15
        pruner=Structural(),
        budget=Budget(options.budget, MACs()),
        experts=2,
        recover=Finetune(steps=options.steps - 2 * quarter, learning_rate=rate),
        sampling=Sampling("ddim", steps=20),
    )
    mixture = moediff.build_experts(denoiser, scheduler, task, recipe, options.out, verbose=True)

    subject = moediff.installed().dissect(denoiser, scheduler)
    prices = MACs().price(subject)
    share = mixture.plan.cost(prices, recipe.sampling)["live"] / prices.full
    print(f"intervals {list(mixture.intervals)}, {share:.3f} of the base model's MACs")
    records, _ = read_packed(options.out / "records.safetensors")
    fits = records["intervals/held-out-fit"]  # of one half of the images by the other, N = 1 to 8
    print(f"number of experts that the images support: {1 + int(fits.argmax())}")
    run = Run(sampling=recipe.sampling, verbose=True)
    for name, model in (("base", denoiser), ("DiffPruning", mixture)):
        figure = Frechet("digits", options.samples).measure(model, subject, task, run)
        print(f"{name}: {figure.name} {figure.value:.2f} from {figure.samples} samples")


if __name__ == "__main__":
    main()
