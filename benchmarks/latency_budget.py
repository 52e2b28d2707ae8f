"""Budgets in time: what the latency table promises, what was measured, and what MACs would promise.

The base model is cut to shares of its time by the counter `latency`, and to the same shares of its
MACs, by equal shares of all widths with and without dropped layers. No training, so no images.

    python -m benchmarks.latency_budget --on digits
"""

from __future__ import annotations

import attrs

from benchmarks.paper_speed import droppable, plan_at
from benchmarks.settings import Setting, load, parse_args
from benchmarks.tables import plain, write_table
from moediff import ExpertMixture, Run
from moediff.cost import CostModel
from moediff.errors import BudgetError
from moediff_plugins.counters.latency import Latency
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.prediction import predicted_and_measured
from moediff_plugins.metrics.latency import Latency as Timing

SHARES = (0.7, 0.5, 0.3)
FIGURES = ("MACs", "time, predicted", "time, measured", "measured / predicted")


def row(
    on: Setting, time: CostModel, macs: CostModel, counter: str, share: float, dropped: int
) -> dict[str, str]:
    """Cut to a share of one counter's cost, then time."""
    line = {
        "budget": f"{share:.0%} of {'the time' if counter == 'latency' else 'MACs'}",
        "layers dropped": str(dropped),
    }
    try:
        plan = plan_at(on.subject, time if counter == "latency" else macs, share, dropped)
    except BudgetError:
        return line | dict.fromkeys(FIGURES, "out of reach")
    mixture = ExpertMixture.from_experts([on.subject], plan).eval()
    run = Run(sampling=attrs.evolve(on.sampling, steps=4), device=on.subject.device)
    predicted, measured = predicted_and_measured(
        mixture, time, Timing(pairs=3 if on.options.quick else 31), on.subject, on.task, run
    )
    figures = (
        plain(plan.cost(macs, run.sampling)["live"] / macs.full),
        plain(predicted),
        f"{measured.value:.3f} ± {(measured.spread or 0) / 2:.3f}",
        plain(measured.value / predicted),
    )
    return line | dict(zip(FIGURES, figures, strict=True))


def main() -> None:
    """Make the table."""
    options = parse_args(__doc__.splitlines()[0])
    on = load(options, "latency_budget")
    time = Latency(rounds=3 if options.quick else 31).price(on.subject)
    macs = MACs().price(on.subject)
    lines = [
        row(on, time, macs, counter, share, dropped)
        for counter in ("latency", "macs")
        for share in SHARES
        for dropped in (0, droppable(on.subject) // 2)
    ]
    about = (
        f"The {on.name} base model cut to budgets, at batch 4. MACs and time are shares of the "
        "base model's; measured is the median ratio of pairs, with half the interquartile range. "
        "Out of reach is what one unit of every width still exceeds."
    )
    write_table("latency_budget", "Budgets in time", about, lines, on)


if __name__ == "__main__":
    main()
