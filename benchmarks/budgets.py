"""DiffPruning's Table 1: budgets of 70, 50 and 30 %, and what else gets to half of the MACs.

A base whose layers' fixed parts take more than 30 % has the next twentieth above them instead.

"taylor" and "diff-pruning" remove the units that their scores call unimportant from one model;
"diff-pruning" is SP, Structural Pruning for Diffusion Models (Fang et al., 2023). "torch-pruning"
is that tool, in its authors' way and in one that suits few steps. All rows have the same number of
optimiser batches but one, which tells what fewer of them cost: DiffPruning spends most of its own
before it fine-tunes. Another one tells which units from how many: it keeps as many units of every
width as "taylor", and those with the largest L1 norms, as DiffPruning does.

    pip install torch-pruning
    python -m benchmarks.budgets --on digits
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import attrs
import torch
from matplotlib.figure import Figure

from benchmarks.recipes import GATES, base_rows, diffpruning, finetune, from_scratch
from benchmarks.rows import Figures, Row, collect, measure, slug, train, trained
from benchmarks.settings import Setting, parse_args, whole_task
from benchmarks.tables import (
    describe,
    distances,
    plain_ticks,
    summarise,
    write_picture,
    write_plot,
    write_table,
)
from benchmarks.torch_pruning_baseline import pruned_row
from moediff import Plan, Recipe, Run, Scores
from moediff.roles import Scorer
from moediff.storage import read_packed
from moediff_plugins.counters.macs import MACs
from moediff_plugins.gates.one_hot import OneHot
from moediff_plugins.reports import document, plots
from moediff_plugins.scorers.diff_pruning import DiffPruning
from moediff_plugins.scorers.magnitude import Magnitude
from moediff_plugins.scorers.taylor import Taylor

HALF, LEAST = 0.5, 0.3
OURS = "DiffPruning, {:.0%}"
OURS_HALF = OURS.format(HALF)
TAYLOR = "taylor, 50%"
SHORT = "taylor, 50%, fine-tuned as little"
COUNTS = "taylor, 50%, with L1's units"


def shares_of(on: Setting) -> tuple[float, ...]:
    """The budgets, the last one no lower than DiffPruning gets."""
    pruner, prices = diffpruning(on).pruner, MACs().price(on.subject)
    space = pruner.space(on.subject, Scores(torch.zeros(len(on.subject.anatomy.units))))
    floor = float(prices.experts(space.smallest())) / prices.full
    return 0.7, HALF, max(LEAST, math.ceil(20 * floor) / 20)


def by_score(on: Setting, scorer: Scorer) -> Recipe:
    """One model without the units whose scores are lowest, fine-tuned with all of the batches."""
    return attrs.evolve(
        diffpruning(on, HALF, experts=1),
        scorer=scorer,
        prepare=None,
        gate=OneHot(),
        recover=finetune(on),
    )


def with_units(on: Setting, recipe: Recipe, scorer: Scorer, name: str) -> Row:
    """Of every width as many units as another recipe keeps, but those that a scorer ranks first.

    Args:
        on: the setting.
        recipe: the other one, for one expert.
        scorer: ranks units inside a layer.
        name: of this row.
    """

    def row(seed: int) -> dict[str, float]:
        plan = train(attrs.evolve(recipe, recover=None), on, f"{name}, how many", seed).plan
        values = scorer.score(on.subject, on.task, Run(seed=seed)).values
        (counted,) = plan.blueprints
        keep = {
            width: values[on.subject.anatomy.spans[width]].topk(len(kept)).indices.tolist()
            for width, kept in counted.keep.items()
        }
        plan = attrs.evolve(plan, blueprints=(attrs.evolve(counted, keep=keep),))
        return measure(train(recipe, on, name, seed, {"plan": plan}), on, seed)

    return Row(row, (recipe, scorer))


def rows(on: Setting, shares: Sequence[float]) -> dict[str, Row]:
    """The base rows, the budgets, and the others at half of the MACs."""
    ours = {OURS.format(share): diffpruning(on, share) for share in shares}
    recipes = ours | {
        "single expert, 50%": diffpruning(on, HALF, experts=1),
        TAYLOR: by_score(on, Taylor()),
        SHORT: attrs.evolve(by_score(on, Taylor()), recover=ours[OURS_HALF].recover),
        "diff-pruning, 50%": by_score(on, DiffPruning(stride=on.stride)),
    }
    return {
        **base_rows(on),
        **{name: trained(recipe, on, name) for name, recipe in recipes.items()},
        COUNTS: with_units(on, recipes[TAYLOR], Magnitude(), COUNTS),
        "from scratch, 50%": from_scratch(on, recipes[OURS_HALF], OURS_HALF),
        "torch-pruning, 50%": pruned_row(on, HALF),
        "torch-pruning, first stage kept, 50%": pruned_row(on, HALF, keep_path=True),
    }


def curves(figures: Figures, shares: Sequence[float]) -> Figure:
    """Distance by MACs and by measured time: the budgets as a line, everything else as points."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    key = distances(figures)[0]
    ours = [OURS.format(share) for share in shares]
    others = [name for name in figures if name not in ours]

    def at(name: str, cost: str) -> tuple[float, float]:
        found = figures[name]
        return statistics.mean(o[cost] for o in found), statistics.mean(o[key] for o in found)

    for axis, cost in zip(axes, ("MACs", "latency"), strict=True):
        line = [at(name, cost) for name in ours]
        axis.plot(*zip(*line, strict=True), color="C0", marker="o", label="DiffPruning")
        for place, (name, marker) in enumerate(zip(others, cycle("sD^v<>PX*h"), strict=False)):
            style = {"marker": marker, "color": f"C{1 + place % 9}", "fillstyle": "none"}
            axis.plot(*at(name, cost), linestyle="", markersize=8, label=name, **style)
        axis.set_xlabel(f"{cost} of a call / base")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")  # what falls apart would press the others together
    plain_ticks(axes[0].yaxis)
    axes[0].set_ylabel(f"{key}, mean over the seeds")
    axes[1].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def intervals_of(on: Setting) -> document.Figure:
    """The alignment of the timesteps, from the first seed of the row at half of the MACs."""
    records, _ = read_packed(_folder(on, OURS_HALF) / "records.safetensors")
    return plots.alignment_plot(
        "Alignment",
        "",
        records["intervals/similarity"],
        _plan(on, OURS_HALF).intervals.cuts,
        objective=records["intervals/objective"],
        held_out=records["intervals/held-out-fit"],
        reliability=records["intervals/reliability"],
    )


def experts_of(on: Setting, name: str) -> document.Figure:
    """What the experts of a row keep, from the first seed."""
    return plots.plan_plot(name, "", on.subject.anatomy, _plan(on, name))


def _plan(on: Setting, name: str) -> Plan:
    return Plan.from_json((_folder(on, name) / "plan.json").read_text(encoding="utf-8"))


def _folder(on: Setting, name: str) -> Path:
    """Where the first seed of a row was trained."""
    return on.folder / slug(name, on.seeds[0])


def main() -> None:
    """Make the table and the plots."""
    options = parse_args(__doc__.splitlines()[0])
    on = whole_task(options, "budgets")
    shares = shares_of(on)
    figures = collect(rows(on, shares), on)
    lines = summarise(figures, OURS_HALF, ["latency"])
    about = (
        "Budgets are shares of the base model's MACs"
        f"{', 30 % of which is out of reach' if shares[-1] > LEAST else ''}. "
        "`taylor`, `diff-pruning` and `torch-pruning` prune one model, without elastic tuning; the "
        "first two remove what has the lowest score per MAC, of layers the deepest first, until "
        "the budget is met. `torch-pruning, first stage kept` was chosen after seeing the images "
        "of the row before. `from scratch` has new weights in the architecture of "
        f"`{OURS_HALF}`, and `{COUNTS}` keeps as many units of every width as `{TAYLOR}`, those "
        "with the largest L1 norms; what it took to find these is not counted. "
        f"`{SHORT}` has no more batches than the fine-tuning of `{OURS_HALF}`. "
        f"{GATES} " + describe(on)
    )
    write_table("budgets", "Budgets and other tools (DiffPruning Table 1)", about, lines, on)
    write_plot("budgets", curves(figures, shares), on)
    write_picture("budgets-alignment", intervals_of(on), on)
    for share in shares:
        write_picture(f"budgets-experts-{100 * share:.0f}", experts_of(on, OURS.format(share)), on)
    write_picture("budgets-experts-taylor", experts_of(on, TAYLOR), on)


if __name__ == "__main__":
    main()
