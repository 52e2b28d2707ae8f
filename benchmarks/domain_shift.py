"""MoEDM's Table 1: a base of one set of images, tuned to another one.

The base model knows CIFAR-10; the task are photographs of cats and dogs (`pets32.npz`). Training
uses the task's own images, since a base that does not know them cannot make them.

    python -m benchmarks.domain_shift --on cifar --data FOLDER
"""

from __future__ import annotations

import attrs

from benchmarks import cifar
from benchmarks.recipes import SCORED, base_rows, from_scratch, moedm
from benchmarks.rows import Row, collect, trained
from benchmarks.settings import Setting, load, parse_args
from benchmarks.tables import describe, summarise, write_table
from moediff_plugins.tuners.bitfit import BitFit
from moediff_plugins.tuners.partial import Partial

MOEDM = "MoEDM"


def rows(on: Setting) -> dict[str, Row]:
    """The rows of Table 1."""
    recipe = moedm(on, real=True)
    whole = {"plan": on.whole}
    size = {"steps": on.steps, "batch": on.batch, "precision": on.precision}
    bitfit = attrs.evolve(recipe, experts=1, recover=BitFit(learning_rate=10 * on.rate, **size))
    partial = attrs.evolve(recipe, experts=1, recover=Partial(learning_rate=on.rate, **size))
    single = attrs.evolve(recipe, experts=1)
    return {
        **base_rows(on),
        "BitFit": trained(bitfit, on, "BitFit", whole),
        "partial, 29 %": trained(partial, on, "partial", whole),
        "MoEDM from scratch": from_scratch(on, recipe, MOEDM),
        "MoEDM without dynamic": trained(single, on, "without dynamic"),
        MOEDM: trained(recipe, on, MOEDM),
    }


def main() -> None:
    """Make the table."""
    options = parse_args(__doc__.splitlines()[0], bases=("cifar",))
    on = load(options, "domain_shift")
    task, test = (cifar.load_pets(options.data, split) for split in ("train", "test"))
    on = attrs.evolve(on, task=task, reference=test, unseen=test)
    lines = summarise(collect(rows(on), on), MOEDM)
    about = f"A base trained on CIFAR-10 is tuned to pets32, on its images. {SCORED} " + describe(
        on
    )
    write_table("domain_shift", "Domain shift (MoEDM Table 1)", about, lines, on)


if __name__ == "__main__":
    main()
