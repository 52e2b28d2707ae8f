"""DiffPruning's Table 2: what experts, the ERA, elastic depth and elastic width add, one by one.

Every rung has the same number of optimiser batches; those without elastic tuning are fine-tuned
for longer (Sec. 4.2). A row beside the ladder has another order of the units, and three have more
batches, to tell what a part does from what it takes away: masks that are trained ten times as long,
experts of which each sees as many batches as the single one, and DiffPruning that is fine-tuned as
long as a rung without elastic tuning.

    python -m benchmarks.ladder --on digits
"""

from __future__ import annotations

from itertools import pairwise

import attrs

from benchmarks.recipes import GATES, base_rows, diffpruning
from benchmarks.rows import Row, collect, trained
from benchmarks.settings import Setting, parse_args, whole_task
from benchmarks.tables import describe, summarise, write_table
from moediff_plugins.scorers.taylor import Taylor

RUNGS = {
    "independent masks, one expert": {
        "experts": 1, "era": False, "depth": False, "width": False,
    },
    "+ experts": {"era": False, "depth": False, "width": False},
    "+ ERA": {"depth": False, "width": False},
    "+ elastic depth": {"width": False},
    "+ elastic width": {},
}  # fmt: skip
"""Rung -> the parts of DiffPruning that it is without, lowest first."""

TAYLOR = "ERA, units in Taylor's order"
TWICE = "experts, twice the batches"
MASKS = "ERA, ten times the masks' batches"
LONGER = "DiffPruning, fine-tuned as long as ERA"


def rows(on: Setting) -> dict[str, Row]:
    """The base rows, the rungs, and what is beside them."""
    recipes = {name: diffpruning(on, **parts) for name, parts in RUNGS.items()}
    era = recipes["+ ERA"]
    recipes[TAYLOR] = attrs.evolve(era, scorer=Taylor())
    twice = attrs.evolve(on, steps=2 * on.steps)
    recipes[TWICE] = diffpruning(twice, **RUNGS["+ experts"])
    gate = attrs.evolve(era.gate, steps=10 * era.gate.steps)  # type: ignore[attr-defined]
    recipes[MASKS] = attrs.evolve(era, gate=gate)
    recipes[LONGER] = attrs.evolve(recipes["+ elastic width"], recover=era.recover)
    return base_rows(on) | {name: trained(recipe, on, name) for name, recipe in recipes.items()}


def main() -> None:
    """Make the table."""
    options = parse_args(__doc__.splitlines()[0])
    on = whole_task(options, "ladder")
    below = {upper: lower for lower, upper in pairwise(RUNGS)}
    below |= {TAYLOR: "+ ERA", TWICE: next(iter(RUNGS)), MASKS: "+ ERA", LONGER: "+ ERA"}
    lines = summarise(collect(rows(on), on), below, ["latency"])
    about = (
        "Each rung adds one part to the one above it and is compared with that one; the rung with "
        f"elastic width is DiffPruning. `{TAYLOR}` is the ERA's rung with another scorer than the "
        f"paper's L1. The last three rows have more batches: `{TWICE}` is compared with the single "
        f"expert, of which each of its experts has the batches, `{MASKS}` and `{LONGER}` with the "
        f"rung of the ERA, whose fine-tuning they have. {GATES} " + describe(on)
    )
    write_table(
        "ladder", "The parts of DiffPruning at half of the MACs (Table 2)", about, lines, on
    )


if __name__ == "__main__":
    main()
