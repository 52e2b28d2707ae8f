"""A budget bound to prices, calls and copies: what a plan may cost, and what fits into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import torch

from moediff.cost import Budget, CostModel
from moediff.errors import BudgetError
from moediff.space import SearchSpace


@attrs.frozen
class Step:
    """Units that open or close together, as (expert, unit) pairs.

    `behind` are the pairs of the next, more important unit of the same chain: it must be open
    before these open, so that chains stay nested.
    """

    units: tuple[tuple[int, int], ...]
    behind: tuple[tuple[int, int], ...] | None = None


@attrs.frozen(eq=False)
class Allowance:
    """A budget bound to prices, calls and a copies table: what a plan may cost and what it does.

    Gates share this arithmetic; what they keep is their own business.

    Attributes:
        budget: the share that was asked for.
        prices: the budget's counter, applied to the base model.
        calls: (N,) denoiser calls per image of each expert.
        copies: layer name -> one copy number per expert.
    """

    budget: Budget
    prices: CostModel
    calls: tuple[int, ...]
    copies: Callable[[str], tuple[int, ...]]

    @property
    def limit(self) -> float:
        return self.budget.value * self.prices.full

    def cost(self, masks: torch.Tensor) -> torch.Tensor:
        """Cost () of masks (N, U), differentiable."""
        if self.budget.of == "stored":
            return self.prices.stored(masks, self.copies)
        return self.prices.total(masks, self.calls)

    def fits(self, masks: torch.Tensor) -> bool:
        return float(self.cost(masks)) <= self.limit * (1 + 1e-9)

    def check_floor(self, spaces: Sequence[SearchSpace]) -> None:
        """Refuse a budget that even the smallest sub-networks exceed, naming the floor."""
        smallest = torch.stack([space.smallest() for space in spaces])
        floor = float(self.cost(smallest)) / self.prices.full
        if floor > self.budget.value * (1 + 1e-9):
            raise BudgetError(
                f"budget: got {self.budget.value:.4g} of the base model's {self.prices.unit} "
                f"({self.budget.of}); the floor that this pruner can reach is {floor:.4f}. Ask for "
                "more, or for a pruner that may remove more."
            )

    def fill(self, masks: torch.Tensor, candidates: Sequence[Step]) -> torch.Tensor:
        """Return masks (N, U) with closed units opened again where the budget has room.

        Args:
            masks: (N, U) of zeros and ones that fit.
            candidates: the closed units, best first.
        """
        masks = masks.clone()
        for step in candidates:
            if step.behind is not None and not all(masks[e, u] for e, u in step.behind):
                continue
            opened = masks.clone()
            for expert, unit in step.units:
                opened[expert, unit] = 1
            if self.fits(opened):
                masks = opened
        return masks
