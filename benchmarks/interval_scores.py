"""Ablation scores of each interval by itself, an experiment that neither paper ran.

A channel is closed inside one interval only. Do the intervals rank the channels differently, and
do experts that are cut by their own ranking do better than experts that are cut alike?

    python -m benchmarks.interval_scores --on digits
"""

from __future__ import annotations

import itertools

import attrs

import moediff
from benchmarks.recipes import finetune, moedm
from benchmarks.rows import Row, collect, trained
from benchmarks.settings import Setting, load, parse_args
from benchmarks.tables import describe, summarise, write_table
from moediff import Budget, Intervals, Run
from moediff_plugins.counters.params import Params
from moediff_plugins.pruners.structural import Structural
from moediff_plugins.scorers.ablation_l1_sketch import AblationL1Sketch
from moediff_plugins.scorers.channels import spearman

ALIKE = "one ranking, trained"


def agreement(on: Setting, count: int) -> str:
    """Rank correlations of the channels' scores between `count` equal intervals, in words."""
    scorer = AblationL1Sketch(images=4 * on.noises, by_interval=True)
    intervals = Intervals.uniform(on.subject.total, count)
    found = []
    for expert in on.subject.split(intervals):
        run = Run(sampling=moedm(on).sampling, experts=count, verbose=True)
        scorer.score(expert, on.task, run)
        found.append((expert.interval, run.records["free/channels"]))
    pairs = itertools.combinations(found, 2)
    parts = [f"{a} with {b} {spearman(x, y):.2f}" for (a, x), (b, y) in pairs]
    return "; ".join(parts)


def rows(on: Setting) -> dict[str, Row]:
    """Experts cut by one ranking or by their own, before and after fine-tuning."""
    found = {}
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
    about = (
        "Two experts whose units are removed (`structural`, 30 % of the parameters in one call) by "
        "sketched ablation scores over all timesteps, or over their own interval. Spearman "
        f"correlation of all channels' scores between four equal intervals: {agreement(on, 4)}. "
        + describe(on)
    )
    title = "Scores by interval"
    write_table("interval_scores", title, about, lines, on)


if __name__ == "__main__":
    main()
