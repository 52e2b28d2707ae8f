"""What `alignment` needs at full size (DiffPruning Sec. 3.3): memory beside the weights.

The weights are random, because no figure depends on them. One timestep's gradients are
sketched with one image and with two at once, and with activations computed again in the backward
pass (diffusers' `enable_gradient_checkpointing`) instead of kept.

    python -m benchmarks.paper_alignment
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.paper_models import BEDROOM, CHURCH, parse_args, random_model, write_table
from moediff import Run, Subject, Task
from moediff_plugins.clusterers.alignment import Alignment
from moediff_plugins.metrics.memory import live_peak, weight_bytes

CASES = {"LDM, Bedroom": BEDROOM, "LDM, Church": CHURCH}
CELLS = 2
"""Timesteps that are looked at; each has two halves of images."""


def row(name: str, config: dict[str, Any], options: argparse.Namespace) -> dict[str, str]:
    """Sketch two timesteps of one model."""
    subject, task = random_model(config, options.device)
    weights = weight_bytes(subject.denoiser)
    found: dict[str, str] = {
        "model": f"{name}, {weights / 4e6:.0f} M parameters",
        "weights": f"{weights / 2**30:.2f} GB",
    }
    for title, batch, recomputed in (
        ("one image", 1, False), ("two images", 2, False), ("one image, recomputed", 1, True),
    ):  # fmt: skip
        if recomputed:
            subject.denoiser.enable_gradient_checkpointing()
        found[title] = f"{peak(subject, task, batch) / 2**30:.2f} GB"
    return found


def peak(subject: Subject, task: Task, batch: int) -> int:
    """Most bytes alive beside the weights while gradients are sketched."""
    stride = subject.total // CELLS
    clusterer = Alignment(stride=stride, images=2 * batch, batch=batch)
    return live_peak(lambda: clusterer.cluster(subject, task, Run(experts=CELLS)))


def main() -> None:
    """Make the table."""
    options = parse_args(__doc__.splitlines()[0])
    about = (
        "Models with random weights. `weights` are those of the model; the other sizes are the "
        "most bytes that were alive beside them while `alignment` sketched the gradients of a "
        f"timestep, at its default of {Alignment().sketch} numbers, with so many images in a batch."
    )
    lines = [row(name, config, options) for name, config in CASES.items()]
    title = "Alignment at the paper's sizes (DiffPruning Sec. 3.3)"
    write_table("paper_alignment", title, about, lines, options)


if __name__ == "__main__":
    main()
