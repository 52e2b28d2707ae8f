"""Costs with units, a price per unit of the anatomy, and budgets over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs
import torch

from moediff.anatomy import Anatomy
from moediff.errors import BudgetError
from moediff.plan import REST
from moediff.subject import Subject


@attrs.frozen
class Cost:
    """One forward pass at batch 1 (or all parameters), in `unit`, with its parts."""

    value: float
    unit: str
    by_operator: Mapping[str, float] = attrs.field(factory=dict, hash=False)
    by_module: Mapping[str, float] = attrs.field(factory=dict, hash=False, repr=False)


@attrs.frozen(eq=False)
class CostModel:
    """Prices that add up to the cost of any sub-network, differentiable in soft masks.

    DiffPruning Eq. 12-13, whose print leaves out the division by the number of units and the
    part that no unit carries: a layer costs a fixed part (embedding, normalisation, shortcut)
    plus a part per unit, multiplied by the layer's own mask; a dropped layer costs its bypass.

    Attributes:
        anatomy: what the prices are for, with U units and L layers.
        scheduler: the base model's, from which a sampling derives its calls.
        unit: the unit of every price.
        outside: the price of what belongs to no layer.
        fixed: (L,) price of a kept layer beside its units.
        bypass: (L,) price of what stays of a dropped layer.
        units: (U,) price of each unit; zero at layer units.
    """

    anatomy: Anatomy
    scheduler: Any
    unit: str
    outside: float
    fixed: torch.Tensor
    bypass: torch.Tensor
    units: torch.Tensor

    def layers(self, masks: torch.Tensor) -> torch.Tensor:
        """Cost of each layer (..., L) for masks (..., U)."""
        priced = masks * self.units.to(masks)
        columns = []
        for index, layer in enumerate(self.anatomy.layers):
            cost = self.fixed[index] + sum(
                (priced[..., self.anatomy.spans[width.name]].sum(-1) for width in layer.widths),
                start=masks.new_zeros(masks.shape[:-1]),
            )
            if layer.droppable:
                gate = masks[..., self.anatomy.layer_units[layer.name]]
                cost = gate * cost + (1 - gate) * self.bypass[index]
            columns.append(cost)
        return torch.stack(columns, dim=-1)

    def experts(self, masks: torch.Tensor) -> torch.Tensor:
        """Cost of one call of each expert (...,) for masks (..., U)."""
        return self.layers(masks).sum(-1) + self.outside

    def total(self, masks: torch.Tensor, calls: Sequence[float]) -> torch.Tensor:
        """Mean cost of a call, (): experts weighted by their calls (Eq. 14 generalised).

        Args:
            masks: (N, U).
            calls: (N,), how often a sampling calls each expert (`Sampling.calls`).
        """
        weights = torch.as_tensor(calls, dtype=masks.dtype, device=masks.device)
        return (self.experts(masks) * weights).sum() / weights.sum()

    def stored(self, masks: torch.Tensor, copies: Callable[[str], tuple[int, ...]]) -> torch.Tensor:
        """Cost of every distinct copy, (); `copies` maps a layer's name to N copy numbers."""
        layers = self.layers(masks)
        total = torch.as_tensor(self.outside * len(set(copies(REST))), dtype=masks.dtype)
        for index, layer in enumerate(self.anatomy.layers):
            numbers = copies(layer.name)
            first = [numbers.index(number) for number in sorted(set(numbers))]
            total = total + layers[first, index].sum()
        return total

    @property
    def full(self) -> float:
        """The cost of the whole base model."""
        return float(self.experts(torch.ones(len(self.anatomy.units), dtype=torch.float64)))


def cost_model(
    subject: Subject,
    unit: str,
    total: float,
    modules: Mapping[str, float],
    widths: Mapping[str, float],
) -> CostModel:
    """Build prices from what every module costs by itself and what every width carries.

    Args:
        subject: the base model, whose layers and units are priced.
        unit: the unit of all numbers.
        total: the cost of the whole denoiser.
        modules: module path -> cost of its own operators, children not included.
        widths: width name -> the share of the cost that is proportional to its units.
    """

    def below(path: str) -> float:
        return sum(v for k, v in modules.items() if k == path or k.startswith(f"{path}."))

    anatomy = subject.anatomy
    layers = [sum(below(path) for path in layer.modules) for layer in anatomy.layers]
    carried = [sum(widths[width.name] for width in layer.widths) for layer in anatomy.layers]
    bypass = [below(layer.shortcut) if layer.shortcut else 0.0 for layer in anatomy.layers]
    units = torch.zeros(len(anatomy.units), dtype=torch.float64)
    for name, width in anatomy.widths.items():
        units[anatomy.spans[name]] = widths[name] / width.count
    return CostModel(
        anatomy=anatomy,
        scheduler=subject.scheduler,
        unit=unit,
        outside=total - sum(layers),
        fixed=torch.tensor(layers, dtype=torch.float64)
        - torch.tensor(carried, dtype=torch.float64),
        bypass=torch.tensor(bypass, dtype=torch.float64),
        units=units,
    )


@attrs.frozen
class Budget:
    """A share of the base model's cost.

    Attributes:
        value: the share, in (0, 1].
        counter: the strategy that counts.
        of: "live", the mean cost of a denoiser call, weighted by the calls that the sampling
            really makes; or "stored", the cost of every copy.
    """

    value: float = attrs.field(converter=float)
    counter: Any
    of: Literal["live", "stored"] = attrs.field(
        default="live", validator=attrs.validators.in_(("live", "stored"))
    )

    @value.validator
    def _check(self, attribute: attrs.Attribute[float], value: float) -> None:
        if not 0 < value <= 1:
            raise BudgetError(
                f"budget: got {value}; allowed is a share of the base model's cost, above 0 and "
                "at most 1, for example 0.5."
            )
