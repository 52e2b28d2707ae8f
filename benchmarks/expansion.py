"""MoEDM's Table 7: which layers get copies, among them a learned choice.

"uneven" is the paper's: half of the layers that remain, those nearest to the input and the output,
have two copies. "learned" and "uniform 2x, fewer layers" store no more than "uneven" does.

    python -m benchmarks.expansion --on digits
"""

from __future__ import annotations

import attrs

import moediff
from benchmarks.recipes import TAUGHT, base_rows, moedm
from benchmarks.rows import Row, collect, trained
from benchmarks.settings import Setting, load, parse_args
from benchmarks.tables import describe, summarise, write_table
from moediff import Budget, Plan, Recipe
from moediff_plugins.counters.params import Params
from moediff_plugins.gates.learned_expansion import LearnedExpansion
from moediff_plugins.gates.one_hot import OneHot

WITHOUT = "without dynamic"


def planned(recipe: Recipe, on: Setting) -> Plan:
    """What a recipe would build."""
    untrained = attrs.evolve(recipe, recover=None)
    return moediff.build_experts(
        on.subject.denoiser, on.subject.scheduler, on.task, untrained, cache=on.cache
    ).plan


def rows(on: Setting) -> dict[str, Row]:
    """The rows of Table 7 and the learned one."""
    uniform = moedm(on)
    kept = len(on.subject.anatomy.layers) - len(planned(uniform, on).blueprints[0].drop)
    uneven = attrs.evolve(uniform, gate=OneHot(outer=kept // 2))
    price = Params().price(on.subject)
    stored = planned(uneven, on).cost(price, on.sampling)["stored"] / price.full
    gate = LearnedExpansion(live=uniform.budget.value, steps=on.steps // 2, batch=on.batch)
    as_much = Budget(stored, Params(), of="stored")
    recipes = {
        WITHOUT: attrs.evolve(uniform, experts=1),
        "uniform 2x": uniform,
        "uniform 2x, fewer layers": attrs.evolve(uniform, budget=as_much),
        "uneven": uneven,
        "learned": attrs.evolve(uniform, gate=gate, budget=as_much),
    }
    return base_rows(on) | {name: trained(recipe, on, name) for name, recipe in recipes.items()}


def main() -> None:
    """Make the table."""
    options = parse_args(__doc__.splitlines()[0])
    on = load(options, "expansion")
    lines = summarise(collect(rows(on), on), WITHOUT)
    about = (
        "The rows differ in which of the layers that remain have a copy per interval; all but "
        '"fewer layers" keep the same ones. "learned" and "fewer layers" store at most what '
        '"uneven" does. The steps of "learned" count those that its gate was trained for. '
        + f"{TAUGHT} "
        + describe(on)
    )
    write_table("expansion", "Expansion strategies (MoEDM Table 7)", about, lines, on)


if __name__ == "__main__":
    main()
