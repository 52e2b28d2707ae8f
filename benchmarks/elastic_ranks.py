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

from benchmarks.recipes import diffpruning, finetune
from benchmarks.rows import Figures, Row, collect, slug, train
from benchmarks.settings import Setting, parse_args, whole_task
from benchmarks.tables import difference, plain_ticks, spread, write_plot, write_table
from moediff import (
    Blueprint,
    ExpertMixture,
    Intervals,
    Plan,
    Recipe,
    Subject,
    denoising_loss,
)  # fmt: skip
from moediff.plan import REST
from moediff.storage import read_packed
from moediff_plugins.clusterers.uniform import Uniform
from moediff_plugins.scorers.channels import spearman
from moediff_plugins.tuners.elastic import Elastic
from moediff_plugins.tuners.finetune import Finetune

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
    subnets = 3 if on.options.quick else 12
    intervals = Intervals.uniform(on.subject.total, EXPERTS)
    given = on.subject.split(intervals)
    elastic, masks = _elastic(on, given, intervals, subnets, seed)
    judges = [Judge(on, interval, 1 if on.options.quick else PASSES) for interval in intervals]
    found: list[dict[str, list[float]]] = [{state: [] for state in STATES} for _ in intervals]
    for number in range(subnets):
        blueprints = [Blueprint.from_mask(on.subject.anatomy, of[number]) for of in masks]
        plan = Plan(intervals, blueprints, {REST: tuple(range(EXPERTS))})
        for state, experts in (("base", given), ("elastic", elastic)):
            untrained = ExpertMixture.from_experts(experts, plan)
            recipe = attrs.evolve(_recipe(on), recover=_tuner(on))
            stages = {"plan": plan, "experts": experts}
            tuned = train(recipe, on, f"{state} {number}", seed, stages).model
            for index, judge in enumerate(judges):
                found[index][state].append(judge(untrained.experts[index]))
                found[index][f"tuned from {state}"].append(judge(tuned.experts[index]))
    return found


def _recipe(on: Setting) -> Recipe:
    """DiffPruning with nothing but what is asked of it here."""
    recipe = diffpruning(on, experts=EXPERTS, depth=False, width=False)
    return attrs.evolve(recipe, clusterer=Uniform(), recover=None)


def _tuner(on: Setting) -> Finetune:
    """What a sub-network is fine-tuned with, as much for each expert as its share is."""
    return attrs.evolve(finetune(on), steps=max(EXPERTS, on.steps // 4))


def _elastic(
    on: Setting, given: Sequence[Subject], intervals: Intervals, subnets: int, seed: int
) -> tuple[list[Subject], list[torch.Tensor]]:
    """The elastic experts, and for each the masks (S, U) of the sub-networks to look at."""
    prepare = Elastic(
        on.steps,
        on.steps,
        batch=on.batch,
        learning_rate=on.rate,
        subnets=subnets,
        precision=on.precision,
    )
    whole = Plan(intervals, (Blueprint(),) * EXPERTS, {REST: tuple(range(EXPERTS))})
    recipe = attrs.evolve(_recipe(on), prepare=prepare)
    mixture = train(recipe, on, "elastic", seed, {"plan": whole}).model
    records, _ = read_packed(on.folder / slug("elastic", seed) / "records.safetensors")
    experts = [
        attrs.evolve(expert, denoiser=denoiser)
        for expert, denoiser in zip(given, mixture.experts, strict=True)
    ]
    return experts, [records[f"prepare/subnets-{index}"] for index in range(EXPERTS)]


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
    depends = (_recipe(on), _tuner(on), PASSES, BATCH)
    return {
        f"timesteps {low} to {high - 1}": Row(functools.partial(row, index), depends)
        for index, (low, high) in enumerate(intervals)
    }


def lines(figures: Figures) -> list[dict[str, str]]:
    """A line per expert: means over the seeds, and what elastic tuning adds, with its spread."""

    def line(name: str, found: Sequence[Mapping[str, float]]) -> dict[str, str]:
        shown = [key for key in found[0] if "/" not in key]
        means = {key: spread([one[key] for one in found]) for key in shown}
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
        plain_ticks(axis.xaxis)
        axis.set_title(name, fontsize="medium", loc="left")
        axis.set_xlabel("loss as a mask")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss cut out and fine-tuned")
    figure.axes[0].legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    """Make the table and the figure."""
    options = parse_args(__doc__.splitlines()[0])
    on = whole_task(options, "elastic_ranks", effort=1)
    figures = collect(rows(on), on)
    subnets = sum(key.startswith("base/") for key in next(iter(figures.values()))[0])
    about = (
        f"{subnets} random sub-networks of every expert: each layer that depth may drop is gone "
        "with probability 0.5, each width has lost a uniform share of its units. `loss, base` and "
        "`loss, elastic` are mean denoising losses as masks of the base and of the expert after "
        f"{on.steps} steps of elastic depth and {on.steps} of elastic width on its interval; "
        f"`tuned` after {_tuner(on).steps} more of fine-tuning, so that what comes from elastic "
        "experts has been trained for longer. All steps are summed over the experts. "
        "`rank` is Spearman's correlation with the loss after fine-tuning from the same weights. "
        f"Steps have {on.batch} images. Means over the seeds {', '.join(map(str, on.seeds))} with "
        "their standard deviation; differences are paired by seed, with a 95 % confidence interval."
    )
    title = "Sub-networks before and after elastic tuning (DiffPruning Sec. 3.4)"
    write_table("elastic_ranks", title, about, lines(figures), on)
    write_plot("elastic_ranks", plot(figures), on)


if __name__ == "__main__":
    main()
