"""What a gate chooses from: scores of units, and the chains in which they may be removed."""

from __future__ import annotations

import itertools

import attrs
import torch

from moediff.anatomy import Anatomy
from moediff.errors import DataError


@attrs.frozen(eq=False)
class Scores:
    """One float per unit, larger = keep.

    Attributes:
        values: (U,), or (N, U) where the experts differ.
        comparable: whether values compare across layers. Scores that only rank units inside
            one layer are normalised per layer before layers compete.
    """

    values: torch.Tensor
    comparable: bool = True

    def __attrs_post_init__(self) -> None:
        if self.values.ndim not in (1, 2) or not torch.isfinite(self.values).all():
            raise DataError(
                f"scores: got shape {tuple(self.values.shape)}, finite: "
                f"{bool(torch.isfinite(self.values).all())}; allowed are finite floats of shape "
                "(U,) or (N, U). Check the scorer."
            )

    def expert(self, index: int) -> Scores:
        """The scores (U,) of one expert."""
        values = self.values if self.values.ndim == 1 else self.values[index]
        return Scores(values, self.comparable)

    def across(self, anatomy: Anatomy) -> torch.Tensor:
        """Values (U,) that compare across layers.

        If they do not by themselves, each width is divided by the sum of its absolute values, and
        the layers' own units by the largest of theirs.
        """
        values = self.values.double()
        if self.comparable:
            return values
        result = torch.zeros_like(values)
        for span in anatomy.spans.values():
            part = values[span]
            result[span] = part / part.abs().sum().clamp(min=torch.finfo(part.dtype).tiny)
        peak = (
            max((abs(values[i].item()) for i in anatomy.layer_units.values()), default=1.0) or 1.0
        )
        for index in anatomy.layer_units.values():
            result[index] = values[index] / peak
        return result


@attrs.frozen
class Chain:
    """Units that may be removed one after the other, first to last; the last one always stays.

    A chain is a width (its least important unit first) or a list of layers. The experts of a
    mixture have chains of the same names and lengths; only the order of the units differs.
    With a `stride` above 1, so many units are removed at a time.
    """

    name: str
    units: tuple[int, ...]
    stride: int = attrs.field(
        default=1, validator=[attrs.validators.instance_of(int), attrs.validators.ge(1)]
    )

    @property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """The units that are removed together, in order; the last of these always stay.

        Where the stride does not divide the length, the first step is the smaller one.
        """
        first = len(self.units) % self.stride
        starts = [*([0] if first else []), *range(first, len(self.units), self.stride)]
        return tuple(self.units[a:b] for a, b in itertools.pairwise([*starts, len(self.units)]))


@attrs.frozen(eq=False)
class SearchSpace:
    """What may be removed from one expert and in which order: disjoint chains, and the scores."""

    anatomy: Anatomy
    chains: tuple[Chain, ...]
    scores: Scores

    @property
    def removable(self) -> int:
        """How many units can be removed in all."""
        return sum(len(chain.units) - len(chain.steps[-1]) for chain in self.chains)

    def smallest(self) -> torch.Tensor:
        """The mask (U,) that keeps as little as these chains allow."""
        mask = torch.ones(len(self.anatomy.units), dtype=torch.float64)
        for chain in self.chains:
            mask[list(chain.units[: -len(chain.steps[-1])])] = 0
        return mask
