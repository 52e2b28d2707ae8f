"""DiffPruning's Table 2: what experts, the ERA, elastic depth and elastic width add, one by one.

Every rung has the same number of optimiser batches; those without elastic tuning are fine-tuned
for longer (Sec. 4.2).

    python -m benchmarks.ladder --on digits
"""

from __future__ import annotations

from itertools import pairwise

from benchmarks.recipes import EFFORT, GATES, base_rows, diffpruning
from benchmarks.rows import Row, collect, trained
from benchmarks.settings import Setting, load, parse_args
from benchmarks.tables import describe, summarise, write_table

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


def rows(on: Setting) -> dict[str, Row]:
    """The base rows, then the rungs."""
    return base_rows(on) | {
        name: trained(diffpruning(on, **parts), on, name) for name, parts in RUNGS.items()
    }


def main() -> None:
    """Make the table."""
    options = parse_args(__doc__.splitlines()[0])
    on = load(options, "ladder", effort=EFFORT)
    below = {upper: lower for lower, upper in pairwise(RUNGS)}
    lines = summarise(collect(rows(on), on), below)
    about = (
        "Each rung adds one part to the one above it and is compared with that one; the last is "
        f"DiffPruning. {GATES} " + describe(on)
    )
    write_table(
        "ladder", "The parts of DiffPruning at half of the MACs (Table 2)", about, lines, on
    )


if __name__ == "__main__":
    main()
