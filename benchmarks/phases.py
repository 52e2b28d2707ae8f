"""What MoEDM's first phase saves (Appendix B): tied weights first, then each copy by itself.

The paper states a third of the iterations. Here training copies from the start is compared with
training in two phases, at equal steps and with a third less.

    python -m benchmarks.phases --on digits
"""

from __future__ import annotations

import attrs

from benchmarks.recipes import TAUGHT, base_rows, moedm
from benchmarks.rows import Row, collect, trained
from benchmarks.settings import Setting, load, parse_args
from benchmarks.tables import describe, summarise, write_table

DIRECT = "copies from the start"


def rows(on: Setting) -> dict[str, Row]:
    """The base rows, then one per way to spend the steps."""
    recipe = moedm(on)
    ways = {
        DIRECT: (0.0, on.steps),
        "two phases": (0.5, on.steps),
        "two phases, a third less": (0.5, on.steps * 2 // 3),
        "copies, a third less": (0.0, on.steps * 2 // 3),
        "tied throughout": (1.0, on.steps),
    }
    found = base_rows(on)
    for name, (tied, steps) in ways.items():
        recover = attrs.evolve(recipe.recover, tied_share=tied, steps=steps)
        found[name] = trained(attrs.evolve(recipe, recover=recover), on, name)
    return found


def main() -> None:
    """Make the table."""
    options = parse_args(__doc__.splitlines()[0])
    on = load(options, "phases")
    lines = summarise(collect(rows(on), on), DIRECT)
    about = f"MoEDM with 2x expansion, trained in different ways. {TAUGHT} " + describe(on)
    write_table("phases", "Two phases of training (MoEDM Appendix B)", about, lines, on)


if __name__ == "__main__":
    main()
