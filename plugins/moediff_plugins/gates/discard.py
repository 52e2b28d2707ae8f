"""What gates that discard first share: greedy removal, and which layers remain after it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence

import torch

from moediff.allowance import Allowance, Step
from moediff.anatomy import Anatomy
from moediff.space import SearchSpace

Bind = Callable[[torch.Tensor], Allowance]
"""Masks (N, U) -> the allowance that holds for them: which layers get copies, and with that what
everything costs, may depend on what remains."""


def discard(spaces: Sequence[SearchSpace], bind: Bind) -> torch.Tensor:
    """Close steps, the least score per saved cost first, until the budget is met; masks (N, U).

    A step closes one position of a chain in every expert at once, so experts with equal spaces
    stay alike. What still fits at the end is opened again, the last closed first.

    Raises:
        BudgetError: the budget is under the floor that the spaces can reach.
    """
    bind(torch.stack([space.smallest() for space in spaces])).check_floor(spaces)
    scores = [space.scores.across(space.anatomy) for space in spaces]
    chains = [_steps(spaces, index) for index in range(len(spaces[0].chains))]
    masks = torch.ones(len(spaces), len(scores[0]), dtype=torch.float64)

    def cost(masks: torch.Tensor) -> float:
        return float(bind(masks).cost(masks))

    def rate(step: Step) -> float:
        saved = cost(masks) - cost(_set(masks, step, 0))
        lost = sum(float(scores[expert][unit]) for expert, unit in step.units)
        return lost / saved if saved > 0 else float("inf")

    queue = [(rate(chain[0]), index, 0) for index, chain in enumerate(chains) if chain]
    heapq.heapify(queue)
    removed: list[Step] = []
    while not bind(masks).fits(masks):
        _, index, position = heapq.heappop(queue)
        step = chains[index][position]
        # Rates only rise, because removing elsewhere in a layer makes it cheaper: ask again.
        current = rate(step)
        if queue and current > queue[0][0]:
            heapq.heappush(queue, (current, index, position))
            continue
        masks = _set(masks, step, 0)
        removed.append(step)
        if position + 1 < len(chains[index]):
            following = chains[index][position + 1]
            heapq.heappush(queue, (rate(following), index, position + 1))
    for step in reversed(removed):
        opened = _set(masks, step, 1)
        nested = step.behind is None or all(masks[e, u] for e, u in step.behind)
        if nested and bind(opened).fits(opened):
            masks = opened
    return masks


def remaining(anatomy: Anatomy, masks: torch.Tensor) -> list[str]:
    """The layers that some expert keeps under masks (N, U), in network order."""
    open_ = (masks > 0.5).any(dim=0)
    return [
        layer.name
        for layer in anatomy.layers
        if not layer.droppable or open_[anatomy.layer_units[layer.name]]
    ]


def _set(masks: torch.Tensor, step: Step, value: float) -> torch.Tensor:
    changed = masks.clone()
    for expert, unit in step.units:
        changed[expert, unit] = value
    return changed


def _steps(spaces: Sequence[SearchSpace], chain: int) -> list[Step]:
    """One chain's removals, first to last, each of them in every expert at once."""
    steps = [space.chains[chain].steps for space in spaces]
    columns = [
        tuple((expert, unit) for expert, units in enumerate(column) for unit in units)
        for column in zip(*steps, strict=True)
    ]
    return [Step(now, behind) for now, behind in itertools.pairwise(columns)]
