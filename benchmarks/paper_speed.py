"""What DiffPruning's budgets save in time at the paper's sizes (Table 1, Bedroom and Church).

The weights are random, because time does not depend on them. Which units go decides how much of the
MACs' saving becomes time, so every budget is met in two ways: by narrower widths alone, and by
widths after half of the layers that depth may drop. One call at batch 4 is timed beside the full
model's, in pairs.

    python -m benchmarks.paper_speed
"""

from __future__ import annotations

from typing import Any

import attrs
import torch

from benchmarks.paper_models import BEDROOM, CHURCH, parse_args, random_model, write_table
from moediff import Blueprint, ExpertMixture, Intervals, Plan, Run, Sampling, Scores, Subject, Task
from moediff.cost import CostModel
from moediff.errors import BudgetError
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.params import Params
from moediff_plugins.metrics.latency import Latency
from moediff_plugins.pruners.structural import Structural

HALVINGS = 20  # of the search for the share that a width keeps


@attrs.frozen
class Case:
    """A model of the paper, what each budget left of its MACs there, and how much faster it was."""

    name: str
    config: dict[str, Any]
    macs: dict[float, float]
    speed_ups: dict[float, float]


CASES = (
    Case(
        "Bedroom",
        BEDROOM,
        {0.7: 70.84 / 101.32, 0.5: 50.69 / 101.32, 0.3: 31.11 / 101.32},
        {0.7: 1.55, 0.5: 1.87, 0.3: 2.35},
    ),
    Case(
        "Church",
        CHURCH,
        {0.7: 14.64 / 20.96, 0.5: 10.48 / 20.96, 0.3: 6.35 / 20.96},
        {0.7: 1.11, 0.5: 1.21, 0.3: 1.32},
    ),
)


def plan_at(subject: Subject, prices: CostModel, share: float, dropped: int) -> Plan:
    """One expert that lost so many layers, and of every width an equal share, to meet a budget.

    Args:
        subject: the full model.
        prices: of the counter that the budget is in.
        share: of the full model's cost.
        dropped: how many layers go, in the order of DiffPruning Supp. 2.3.

    Raises:
        BudgetError: not even with one unit of every width.
    """
    widths, layers = _chains(subject)

    def mask_at(kept: float) -> torch.Tensor:
        mask = torch.ones(len(subject.anatomy.units), dtype=torch.float64)
        mask[layers[:dropped]] = 0
        for units in widths:
            mask[units[: min(int(len(units) * (1 - kept)), len(units) - 1)]] = 0
        return mask

    def share_at(kept: float) -> float:
        return float(prices.total(mask_at(kept)[None], (1.0,))) / prices.full

    low, high = 0.0, 1.0
    if share_at(low) > share:
        raise BudgetError(f"share: got {share:.4g}; equal widths reach {share_at(low):.4g}.")
    for _ in range(HALVINGS):
        kept = (low + high) / 2
        low, high = (kept, high) if share_at(kept) <= share else (low, kept)
    blueprint = Blueprint.from_mask(subject.anatomy, mask_at(low))
    return Plan(Intervals.uniform(subject.total, 1), (blueprint,))


def droppable(subject: Subject) -> int:
    """How many layers depth may drop."""
    return len(_chains(subject)[1])


def _chains(subject: Subject) -> tuple[list[list[int]], list[int]]:
    """The units of every width, and the layers that depth may drop, both in order of removal."""
    units = subject.anatomy.units
    chains = Structural().space(subject, Scores(torch.zeros(len(units)))).chains
    widths = [list(chain.units) for chain in chains if units[chain.units[0]].width is not None]
    layers = [unit for chain in chains for unit in chain.units if units[unit].width is None]
    return widths, layers


def row(
    case: Case,
    subject: Subject,
    task: Task,
    macs: CostModel,
    params: CostModel,
    share: float,
    dropped: int,
    pairs: int,
) -> dict[str, str]:
    """Cut, and time beside the full model."""
    plan = plan_at(subject, macs, share, dropped)
    mixture = ExpertMixture.from_experts([subject], plan).eval()
    run = Run(sampling=Sampling("ddim", 1), device=subject.device, verbose=True)
    time = Latency(batch=4, pairs=pairs).measure(mixture, subject, task, run)
    left = plan.cost(macs, run.sampling)["live"] / macs.full
    return {
        "model": case.name,
        "budget": f"{share:.0%}",
        "layers dropped": str(dropped),
        "params": f"{plan.cost(params, run.sampling)['live'] / params.full:.2f}",
        "MACs": f"{left:.3f}",
        "time": f"{time.value:.3f} ± {(time.spread or 0) / 2:.3f}",
        "faster": f"x{1 / time.value:.2f}",
        "of what MACs promise": f"{left / time.value:.2f}",
        "paper's": f"x{case.speed_ups[share]:.2f}",
        "of its MACs' promise": f"{case.speed_ups[share] * case.macs[share]:.2f}",
    }


def main() -> None:
    """Make the table."""
    options = parse_args(__doc__.splitlines()[0], pairs=5)
    lines = []
    for case in CASES:
        subject, task = random_model(case.config, options.device)
        macs, params = MACs().price(subject), Params().price(subject)
        for share in case.speed_ups:
            for dropped in (0, droppable(subject) // 2):
                lines.append(row(case, subject, task, macs, params, share, dropped, options.pairs))
                print(lines[-1], flush=True)
    about = (
        "Models with random weights. Every width keeps an equal share of its units; where layers "
        "are dropped, the deepest ones go first. Params and MACs are shares of the full model's, "
        f"time is the median ratio of {options.pairs} pairs of calls at batch 4, with half the "
        "interquartile range. The paper's are of whole samplings on one A100, for experts that its "
        "agent chose. Church's attention has 24 channels a head here and 8 heads throughout there."
    )
    title = "DiffPruning's budgets as time (Table 1, a and c)"
    write_table("paper_speed", title, about, lines, options)


if __name__ == "__main__":
    main()
