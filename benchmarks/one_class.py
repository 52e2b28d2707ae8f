"""MoEDM's Tables 2 and 3: one class at a time, the full model against MoEDM.

python -m benchmarks.one_class --on digits
"""

from __future__ import annotations

from benchmarks.recipes import BASE_TUNED, TAUGHT, base_rows, moedm
from benchmarks.rows import Row, collect, trained
from benchmarks.settings import Setting, load, parse_args
from benchmarks.tables import describe, summarise, write_table

CLASSES = {"digits": {"three": 3, "eight": 8}, "cifar": {"cat": 3, "dog": 5}}


def rows(on: Setting) -> dict[str, Row]:
    """The rows of one class."""
    return {
        **base_rows(on),
        "MoEDM, real images": trained(moedm(on, real=True), on, "MoEDM, real images"),
        "MoEDM, distilled": trained(moedm(on), on, "MoEDM, distilled"),
    }


def main() -> None:
    """Make the table."""
    options = parse_args(__doc__.splitlines()[0], list(CLASSES))
    lines = []
    for name, label in CLASSES[options.on].items():
        on = load(options, f"one_class-{label}", (label,))
        found = summarise(collect(rows(on), on), BASE_TUNED)
        real = str(len(on.reference))
        lines += [{"class": name, "real images": real, **line} for line in found]
    about = f"Each class is a task of its own. {TAUGHT} " + describe(on, real="the class's")
    write_table("one_class", "One class at a time (MoEDM Tables 2 and 3)", about, lines, on)


if __name__ == "__main__":
    main()
