"""Budgets in time: what the latency table promises, and what was measured.

The base model is cut to shares of its time by the counter `latency`, and to the same shares of its
MACs, by equal shares of all widths with and without dropped layers. Then it is cut to half of its
MACs by random scores, which makes every width another one, with widths as they fall and rounded.
Last, the Expert Routing Agent spends the budget on two experts. Nothing is fine-tuned, because
only time is asked for.

    python -m benchmarks.latency_budget --on digits
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

import moediff
from benchmarks.paper_speed import droppable, plan_at
from benchmarks.recipes import diffpruning
from benchmarks.settings import Setting, load, parse_args
from benchmarks.tables import plain, write_table
from moediff import Budget, ExpertMixture, Recipe, Run
from moediff.cost import CostModel
from moediff.errors import BudgetError
from moediff_plugins.clusterers.uniform import Uniform
from moediff_plugins.counters.latency import Latency
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.prediction import predicted_and_measured
from moediff_plugins.gates.one_hot import OneHot
from moediff_plugins.metrics.latency import Latency as Timing
from moediff_plugins.pruners.structural import Structural
from moediff_plugins.scorers.random import Random

SHARES = (0.7, 0.5, 0.3)
ROUND_TO = (1, 8, 16)


def even(on: Setting, prices: CostModel, what: str) -> Iterator[tuple[str, ExpertMixture | None]]:
    """The base cut to each share by equal widths; None where one unit of each is above it."""
    for share in SHARES:
        for dropped in (0, droppable(on.subject) // 2):
            name = f"{share:.0%} of {what}, {dropped} layers dropped"
            try:
                plan = plan_at(on.subject, prices, share, dropped)
            except BudgetError:
                yield name, None
                continue
            yield name, ExpertMixture.from_experts([on.subject], plan).eval()


def uneven(on: Setting) -> Iterator[tuple[str, ExpertMixture | None]]:
    """The base cut to half of its MACs by random scores."""
    for channels in ROUND_TO:
        recipe = Recipe(
            scorer=Random(),
            clusterer=Uniform(),
            gate=OneHot(),
            pruner=Structural(round_to=channels),
            budget=Budget(0.5, MACs()),
            experts=1,
        )
        yield f"50% of MACs, uneven, round_to={channels}", built(on, recipe)


def learned(on: Setting, counter: Latency) -> Iterator[tuple[str, ExpertMixture | None]]:
    """The base cut to each share of its time by an Expert Routing Agent, for two experts."""
    for share in SHARES:
        recipe = attrs.evolve(
            diffpruning(on, share, depth=False, width=False),
            clusterer=Uniform(),
            recover=None,
            budget=Budget(share, counter),
        )
        yield f"{share:.0%} of the time, ERA, two experts", built(on, recipe)


def built(on: Setting, recipe: Recipe) -> ExpertMixture | None:
    """A recipe's mixture; None where its pruner's floor is above the budget."""
    try:
        mixture = moediff.build_experts(on.subject.denoiser, on.subject.scheduler, on.task, recipe)
    except BudgetError:
        return None
    return mixture.eval()


def row(
    on: Setting, time: CostModel, macs: CostModel, name: str, mixture: ExpertMixture | None
) -> dict[str, str]:
    """Time a mixture, and ask the table what it expected."""
    columns = ("MACs", "time, predicted", "time, measured", "measured / predicted")
    if mixture is None:
        return {"budget": name} | dict.fromkeys(columns, "out of reach")
    run = Run(sampling=attrs.evolve(on.sampling, steps=4), device=on.subject.device)
    predicted, measured = predicted_and_measured(
        mixture, time, Timing(pairs=3 if on.options.quick else 31), on.subject, on.task, run
    )
    figures = (
        plain(mixture.plan.cost(macs, run.sampling)["live"] / macs.full),
        plain(predicted),
        f"{measured.value:.3f} ± {(measured.spread or 0) / 2:.3f}",
        plain(measured.value / predicted),
    )
    return {"budget": name} | dict(zip(columns, figures, strict=True))


def main() -> None:
    """Make the table."""
    options = parse_args(__doc__.splitlines()[0])
    on = load(options, "latency_budget")
    counter = Latency(rounds=3 if options.quick else 31)
    time, macs = counter.price(on.subject), MACs().price(on.subject)
    mixtures = [
        *even(on, time, "the time"),
        *even(on, macs, "MACs"),
        *uneven(on),
        *learned(on, counter),
    ]
    lines = [row(on, time, macs, name, mixture) for name, mixture in mixtures]
    about = (
        f"The {on.name} base model cut to budgets, at batch 4. MACs and time are shares of the "
        "base model's; measured is the median ratio of pairs, with half the interquartile range. "
        "Out of reach is a budget that the least of every width still exceeds. Uneven cuts and "
        "the ERA's are of one seed."
    )
    write_table("latency_budget", "Budgets in time", about, lines, on)


if __name__ == "__main__":
    main()
