"""Ablation scores of each interval by itself, an experiment that neither paper ran.

A channel is closed inside one interval only. Do the intervals rank the channels differently, and
do experts that are cut by their own ranking do better than experts that are cut alike?

    python -m benchmarks.interval_scores --on digits
"""

from __future__ import annotations

import itertools

import attrs

import moediff
from benchmarks.recipes import base_rows, finetune, moedm
from benchmarks.rows import Row, collect, trained
from benchmarks.settings import Setting, load, parse_args
from benchmarks.tables import describe, spread, summarise, write_table
from moediff import Budget, Intervals, Run
from moediff_plugins.counters.params import Params
from moediff_plugins.pruners.structural import Structural
from moediff_plugins.scorers.ablation_l1 import AblationL1
from moediff_plugins.scorers.ablation_l1_sketch import AblationL1Sketch
from moediff_plugins.scorers.channels import spearman

ALIKE = "one ranking, trained"

QUARTERS = 4
"""Between how many intervals the channels' scores are compared."""


def agreement(on: Setting) -> dict[str, Row]:
    """Spearman correlations of the exact scores of all channels, between every two intervals."""
    scorer = AblationL1(images=on.noises, by_interval=True)
    intervals = Intervals.uniform(on.subject.total, QUARTERS)

    def row(seed: int) -> dict[str, float]:
        sampling = attrs.evolve(moedm(on).sampling, seed=seed)
        found = {}
        for expert in on.subject.split(intervals):
            run = Run(sampling=sampling, experts=QUARTERS, seed=seed, verbose=True)
            scorer.score(expert, on.task, run)
            low, high = expert.interval
            found[f"{low} to {high - 1}"] = run.records["free/channels"]
        pairs = itertools.combinations(found, 2)
        return {f"{a} and {b}": float(spearman(found[a], found[b])) for a, b in pairs}

    return {"agreement": Row(row, (scorer, intervals))}


def rows(on: Setting) -> dict[str, Row]:
    """The base rows, then experts cut by one ranking or by their own, before and after tuning."""
    found = base_rows(on)
    for name, by_interval in (("one ranking", False), ("own rankings", True)):
        scorer = AblationL1Sketch(images=4 * on.noises, by_interval=by_interval)
        recipe = moediff.load_recipe(
            "moedm",
            scorer=scorer,
            pruner=Structural(),
            recover=None,
            budget=Budget(0.3, Params()),
            sampling=moedm(on).sampling,
        )
        pruned, tuned = f"{name}, pruned only", f"{name}, trained"
        found[pruned] = trained(recipe, on, pruned)
        found[tuned] = trained(attrs.evolve(recipe, recover=finetune(on)), on, tuned)
    return found


def main() -> None:
    """Make the table."""
    options = parse_args(__doc__.splitlines()[0])
    on = load(options, "interval_scores")
    lines = summarise(collect(rows(on), on), ALIKE)
    agreeing = "; ".join(
        f"{pair} {spread([one[pair] for one in found])}"
        for (found,) in [collect(agreement(on), on).values()]
        for pair in found[0]
    )
    about = (
        "Two experts whose units are removed (`structural`, 30 % of the parameters in one call) by "
        "sketched ablation scores over all timesteps, or over their own interval. Spearman "
        f"correlations of all channels' exact scores (`ablation-l1`, {on.noises} images) between "
        f"{QUARTERS} equal intervals, with their standard deviation over the seeds: {agreeing}. "
        + describe(on)
    )
    title = "Scores by interval"
    write_table("interval_scores", title, about, lines, on)


if __name__ == "__main__":
    main()
