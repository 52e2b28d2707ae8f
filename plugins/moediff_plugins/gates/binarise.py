"""From keep probabilities to a plan that meets its budget, without noise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from moediff.allowance import Allowance, Step
from moediff.space import SearchSpace


def binarise(
    probabilities: torch.Tensor,
    spaces: Sequence[SearchSpace],
    allowance: Allowance,
    *,
    ordered: bool = True,
) -> torch.Tensor:
    """Keep what lies above one global threshold, found by bisection; masks (N, U).

    What still fits into the budget afterwards is opened again in order of probability, so that
    one large step does not leave room unused.

    Args:
        probabilities: (N, U), equal where units go together; if `ordered`, falling along every
            chain from its last unit to its first.
        spaces: N search spaces.
        allowance: the budget with its prices.
        ordered: whether a unit may be kept only if those behind it in its chain are. Otherwise
            the order of a chain decides nothing but what always stays.
    """
    smallest = torch.stack([space.smallest() for space in spaces]).to(probabilities)
    levels = sorted(set(probabilities.flatten().tolist()))

    def kept(threshold: float) -> torch.Tensor:
        return torch.maximum((probabilities >= threshold).to(smallest), smallest)

    low, high = 0, len(levels)  # levels[low:] is the shortest tail known to fit
    while low < high:
        middle = (low + high) // 2
        if allowance.fits(kept(levels[middle])):
            high = middle
        else:
            low = middle + 1
    masks = kept(levels[low]) if low < len(levels) else smallest
    closed = [step for step in _steps(spaces, ordered) if not masks[step.units[0]]]
    closed.sort(key=lambda step: -float(probabilities[step.units[0]]))
    return allowance.fill(masks, closed)


def _steps(spaces: Sequence[SearchSpace], ordered: bool) -> list[Step]:
    """Every removable step of every expert; within a chain the more important one comes first."""
    return [
        Step(_pairs(expert, units), _pairs(expert, behind) if ordered else None)
        for expert, space in enumerate(spaces)
        for chain in space.chains
        for units, behind in reversed(list(itertools.pairwise(chain.steps)))
    ]


def _pairs(expert: int, units: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((expert, unit) for unit in units)
