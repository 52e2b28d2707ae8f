"""Time and memory of one denoiser call at the papers' sizes (MoEDM Tables 1 to 3 and 6).

The weights are random, because neither figure depends on them. A mixture with 2x expansion that
discards the paper's share of the parameters is timed beside the full model, at batch 4, in pairs.

    python -m benchmarks.paper_size
"""

from __future__ import annotations

import argparse
from typing import Any

import attrs

import moediff
from benchmarks.paper_models import BEDROOM, GUIDED_64, parse_args, random_model, write_table
from moediff import Budget, Run, Sampling
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.params import Params
from moediff_plugins.metrics.latency import Latency
from moediff_plugins.metrics.memory import Memory
from moediff_plugins.scorers.random import Random


@attrs.frozen
class Case:
    """A model of the paper: its configuration, the discard ratio, and what the paper measured."""

    name: str
    config: dict[str, Any]
    discard: float
    time: str
    memory: str


CASES = (
    Case(
        "Guided Diffusion 64",
        GUIDED_64,
        0.71,
        "32.1 / 70.2 ms = 0.46",
        "3689 / 3965 M = 0.93",
    ),
    Case(
        "LDM, 64x64x3 latents",
        BEDROOM,
        0.77,
        "35.11 / 68.82 ms = 0.51",
        "4094 / 5603 M = 0.73",
    ),
)


def row(case: Case, options: argparse.Namespace) -> dict[str, str]:
    """Discard, expand, and measure beside the full model."""
    subject, task = random_model(case.config, options.device)
    budget = Budget(1 - case.discard, Params())
    recipe = moediff.load_recipe("moedm", scorer=Random(), recover=None, budget=budget)
    mixture = moediff.build_experts(subject.denoiser, subject.scheduler, task, recipe)
    mixture.untie()  # as training does: until then copies are one object
    sampling = Sampling("ddim", 1)  # one call a pair; all calls of an expert cost the same
    run = Run(sampling=sampling, device=subject.device, verbose=True)
    time = Latency(batch=4, pairs=options.pairs).measure(mixture, subject, task, run)
    memory = Memory(batch=4).measure(mixture, subject, task, run)
    ours, base = (value / 2**20 for value in run.records["free/memory"].tolist())
    params, macs = Params().price(subject), MACs().price(subject)
    live = mixture.plan.cost(params, sampling)
    return {
        "model": f"{case.name}, {params.full / 1e6:.2f} M parameters",
        "live": f"{live['live'] / params.full:.2f}",
        "stored": f"{live['stored'] / params.full:.2f}",
        "MACs": f"{mixture.plan.cost(macs, sampling)['live'] / macs.full:.2f}",
        "time": f"{time.value:.3f} ± {(time.spread or 0) / 2:.3f}",
        "paper's time": case.time,
        "peak memory": f"{ours:.0f} / {base:.0f} M = {memory.value:.2f}",
        "paper's memory": case.memory,
    }


def main() -> None:
    """Make the table."""
    options = parse_args(__doc__.splitlines()[0], pairs=7)
    about = (
        "Models with random weights, of which `mid-layer` discards the paper's share of the "
        "parameters, with 2x expansion. Live and stored are shares of the full model's parameters, "
        "MACs and time those of one call at batch 4; the time is the median ratio of "
        f"{options.pairs} pairs, with half the interquartile range. Peak memory is that of all "
        "weights and one call, in float32. The paper's figures are from one A100, and those beside "
        "LDM of its conditional cin256-v2; the model here is the unconditional one of LSUN-Bedroom."
    )
    lines = [row(case, options) for case in CASES]
    title = "One call at the paper's sizes (MoEDM Tables 1, 2 and 6)"
    write_table("paper_size", title, about, lines, options)


if __name__ == "__main__":
    main()
