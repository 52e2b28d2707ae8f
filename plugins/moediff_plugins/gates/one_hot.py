"""A training-free gate: prune all experts alike, then copy layers per interval (MoEDM Eq. 2)."""

from __future__ import annotations

import fnmatch
import heapq
import itertools
from collections.abc import Mapping, Sequence

import attrs
import torch

from moediff.cost import Allowance, Budget, Step
from moediff.errors import OptionError
from moediff.plan import REST, Blueprint, Plan, SearchSpace
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run


@attrs.frozen
class OneHot:
    """Remove greedily by score per price, the same in every expert; then expand what remains.

    Super-layer i has k_i copies, each live for consecutive intervals, so that exactly one is
    active at a timestep (MoEDM Eq. 2) and the gate costs nothing at run time. Modules outside the
    layers, and experts that a tuner has already made separate, are never merged or split here.

    Attributes:
        copies: k_i for every layer; None means one copy per interval. It must divide the number
            of intervals.
        uneven: patterns of layer names (as in a shell) -> their own k_i, first match wins
            (MoEDM, Appendix D).
    """

    copies: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.ge(1))
    )
    uneven: Mapping[str, int] = attrs.field(factory=dict, converter=dict, hash=False)

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        table = self._table(experts)
        allowance = Allowance(
            budget=budget,
            prices=budget.counter.price(experts[0]),
            calls=run.sampling.calls(experts[0].scheduler, intervals),
            copies=lambda part: table.get(part, table[REST]),
        )
        allowance.check_floor(spaces)
        masks = _remove(spaces, allowance)
        blueprints = [Blueprint.from_mask(experts[0].anatomy, mask) for mask in masks]
        return Plan(intervals, blueprints, table)

    def _table(self, experts: Sequence[Subject]) -> dict[str, tuple[int, ...]]:
        count = len(experts)
        separate = len({id(expert.denoiser) for expert in experts}) > 1
        if separate:
            return {REST: tuple(range(count))}
        table = {REST: (0,) * count}
        for layer in experts[0].anatomy.layers:
            matches = [k for glob, k in self.uneven.items() if fnmatch.fnmatch(layer.name, glob)]
            copies = matches[0] if matches else self.copies or count
            if copies < 1 or count % copies:
                raise OptionError(
                    f"copies: got {copies} for {layer.name}; allowed are the divisors of the "
                    f"{count} intervals. Ask for a number of experts that every k_i divides."
                )
            table[layer.name] = tuple(i * copies // count for i in range(count))
        return table


def _remove(spaces: Sequence[SearchSpace], allowance: Allowance) -> torch.Tensor:
    """Close steps, the least score per saved cost first, until the budget is met; masks (N, U)."""
    scores = [space.scores.across(space.anatomy) for space in spaces]
    chains = [_steps(spaces, index) for index in range(len(spaces[0].chains))]
    masks = torch.ones(len(spaces), len(scores[0]), dtype=torch.float64)

    def closed(step: Step) -> torch.Tensor:
        trial = masks.clone()
        for expert, unit in step.units:
            trial[expert, unit] = 0
        return trial

    def rate(step: Step) -> float:
        saved = float(allowance.cost(masks) - allowance.cost(closed(step)))
        lost = sum(float(scores[expert][unit]) for expert, unit in step.units)
        return lost / saved if saved > 0 else float("inf")

    queue = [(rate(chain[0]), index, 0) for index, chain in enumerate(chains) if chain]
    heapq.heapify(queue)
    removed: list[Step] = []
    while not allowance.fits(masks):
        _, index, position = heapq.heappop(queue)
        step = chains[index][position]
        # Rates only rise, because removing elsewhere in a layer makes it cheaper: ask again.
        current = rate(step)
        if queue and current > queue[0][0]:
            heapq.heappush(queue, (current, index, position))
            continue
        masks = closed(step)
        removed.append(step)
        if position + 1 < len(chains[index]):
            following = chains[index][position + 1]
            heapq.heappush(queue, (rate(following), index, position + 1))
    return allowance.fill(masks, removed[::-1])


def _steps(spaces: Sequence[SearchSpace], chain: int) -> list[Step]:
    """One chain's removals, first to last, each of them in every expert at once."""
    units = [space.chains[chain].units for space in spaces]
    columns = [tuple(enumerate(column)) for column in zip(*units, strict=True)]
    return [Step(now, behind) for now, behind in itertools.pairwise(columns)]
