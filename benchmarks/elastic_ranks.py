"""What elastic tuning does to sub-networks (DiffPruning Sec. 3.4): are their losses a good proxy?

The paper says that after elastic tuning a sub-network's loss tells how good it will be once it has
been fine-tuned, and that it recovers quickly. Twelve sub-networks of every expert are judged as
masks of the base, as masks of the elastic expert, and cut out and fine-tuned from either.

    python -m benchmarks.elastic_ranks --on digits
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.recipes import finetune
from benchmarks.settings import Setting, load, parse_args
from benchmarks.tables import Figures, Row, collect, difference, write_plot, write_table
from moediff import Blueprint, ExpertMixture, Intervals, Plan, Run, Subject, denoising_loss
from moediff.plan import REST, SearchSpace
from moediff.surgery import cut
from moediff_plugins.pruners.structural import Structural
from moediff_plugins.scorers.channels import spearman
from moediff_plugins.scorers.magnitude import Magnitude
from moediff_plugins.tuners.elastic import Elastic

EXPERTS = 2
PASSES, BATCH = 16, 64  # batches that a sub-network is judged on
STATES = ("base", "elastic", "tuned from base", "tuned from elastic")
"""What a sub-network's loss is measured of."""


@attrs.frozen(eq=False)
class Judge:
    """The same images, timesteps and noise for every sub-network of an interval."""

    on: Setting
    interval: tuple[int, int]
    passes: int

    def __call__(self, denoiser: nn.Module) -> float:
        """The mean denoising loss."""
        generator, total = torch.Generator().manual_seed(1), 0.0
        device, scheduler = self.on.subject.device, self.on.subject.scheduler
        for _ in range(self.passes):
            batch = self.on.reference.batch(BATCH, generator, device)
            timesteps = torch.randint(*self.interval, (BATCH,), generator=generator).to(device)
            with torch.no_grad():
                total += denoising_loss(denoiser, scheduler, batch, timesteps, generator).item()
        return total / self.passes


def losses(on: Setting, seed: int) -> list[dict[str, list[float]]]:
    """For every expert the losses (S,) of its sub-networks in every state."""
    run = Run(sampling=on.sampling, seed=seed, device=on.subject.device, verbose=True)
    intervals = Intervals.uniform(on.subject.total, EXPERTS)
    given = on.subject.split(intervals)

    def rank(expert: Subject) -> SearchSpace:
        return Structural().space(expert, Magnitude().score(expert, on.task, run))

    phase = on.steps
    subnets = 3 if on.options.quick else 12
    tuner = Elastic(phase, phase, batch=on.batch, learning_rate=on.rate, subnets=subnets)
    elastic = tuner.prepare(given, rank, intervals, on.task, run)
    masks = [run.records[f"free/subnets-{index}"] for index in range(EXPERTS)]
    passes = 1 if on.options.quick else PASSES
    judges = [Judge(on, interval, passes) for interval in intervals]
    found: list[dict[str, list[float]]] = [{state: [] for state in STATES} for _ in intervals]
    for number in run.progress(range(subnets), "sub-networks"):
        anatomy = on.subject.anatomy
        blueprints = [Blueprint.from_mask(anatomy, of[number]) for of in masks]
        for state, experts in (("base", given), ("elastic", elastic)):
            tuned = _tuned(on, experts, Plan(intervals, blueprints, {REST: (0, 1)}), number, seed)
            for index, judge in enumerate(judges):
                small = cut(experts[index].denoiser, anatomy, blueprints[index])
                found[index][state].append(judge(small))
                found[index][f"tuned from {state}"].append(judge(tuned[index]))
    return found


def _tuned(
    on: Setting, experts: Sequence[Subject], plan: Plan, number: int, seed: int
) -> Sequence[nn.Module]:
    """Every expert's sub-network, cut out and fine-tuned on its interval."""
    run = Run(sampling=on.sampling, seed=seed * 100 + number, device=on.subject.device)
    tuner = attrs.evolve(finetune(on), steps=max(EXPERTS, on.steps // 4))
    mixture = ExpertMixture.from_experts(experts, plan)
    return list(tuner.recover(mixture, on.task, on.subject, run).experts)


def rows(on: Setting) -> dict[str, Row]:
    """One row per expert; a seed's experts are made together."""
    made: Callable[[int], list[dict[str, list[float]]]] = functools.cache(
        functools.partial(losses, on)
    )

    def row(index: int, seed: int) -> dict[str, float]:
        found = made(seed)[index]
        figures = {f"loss, {state}": statistics.mean(found[state]) for state in STATES}
        for state in STATES[:2]:
            pair = [torch.tensor(found[key]) for key in (state, f"tuned from {state}")]
            figures[f"rank, {state}"] = float(spearman(*pair))
        return figures | {
            f"{state}/{number}": value
            for state in STATES
            for number, value in enumerate(found[state])
        }

    intervals = Intervals.uniform(on.subject.total, EXPERTS)
    return {
        f"timesteps {low} to {high - 1}": functools.partial(row, index)
        for index, (low, high) in enumerate(intervals)
    }


def lines(figures: Figures) -> list[dict[str, str]]:
    """A line per expert: means over the seeds, and what elastic tuning adds, with its spread."""

    def line(name: str, found: Sequence[Mapping[str, float]]) -> dict[str, str]:
        shown = [key for key in found[0] if "/" not in key]
        means = {key: f"{statistics.mean(one[key] for one in found):.3g}" for key in shown}
        gains = [one["rank, elastic"] - one["rank, base"] for one in found]
        worth = [one[f"loss, {STATES[3]}"] - one[f"loss, {STATES[2]}"] for one in found]
        return {
            "expert": name,
            **means,
            "rank, elastic less base": difference(gains),
            "loss tuned, elastic less base": difference(worth),
        }

    return [line(name, found) for name, found in figures.items()]


def plot(figures: Figures) -> Figure:
    """Loss of every sub-network before and after fine-tuning, a panel per expert."""
    figure = Figure(figsize=(5 * len(figures), 4.2), layout="constrained")
    for axis, (name, found) in zip(figure.subplots(1, len(figures)), figures.items(), strict=True):
        for state, colour in zip(STATES[:2], ("C7", "C0"), strict=True):
            numbers = [key.split("/")[1] for key in found[0] if key.startswith(f"{state}/")]
            pairs = [
                (one[f"{state}/{number}"], one[f"tuned from {state}/{number}"])
                for one in found
                for number in numbers
            ]
            axis.scatter(*zip(*pairs, strict=True), c=colour, s=14, label=f"sub-networks: {state}")
        axis.set_xscale("log")
        axis.set_title(name, fontsize="medium", loc="left")
        axis.set_xlabel("loss as a mask")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss cut out and fine-tuned")
    figure.axes[0].legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    """Make the table and the figure."""
    options = parse_args(__doc__.splitlines()[0])
    on = load(options, "elastic_ranks")
    figures = collect(rows(on), on)
    subnets = sum(key.startswith("base/") for key in next(iter(figures.values()))[0])
    about = (
        f"{subnets} random sub-networks of every expert: each layer that depth may drop is gone "
        "with probability 0.5, each width has lost a uniform share of its units. `loss, base` and "
        "`loss, elastic` are mean denoising losses as masks of the base and of the expert after "
        f"{on.steps} steps of elastic depth and {on.steps} of elastic width on its interval; "
        f"`tuned` after {max(EXPERTS, on.steps // 4) // EXPERTS} more steps of fine-tuning. "
        "`rank` is Spearman's correlation with the loss after fine-tuning from the same weights. "
        f"Steps have {on.batch} images. Means over the seeds {', '.join(map(str, on.seeds))}; "
        "differences are paired by seed, with a 95 % confidence interval."
    )
    title = "Sub-networks before and after elastic tuning (DiffPruning Sec. 3.4)"
    write_table("elastic_ranks", title, about, lines(figures), on)
    write_plot("elastic_ranks", plot(figures), on)


if __name__ == "__main__":
    main()
