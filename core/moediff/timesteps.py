"""Intervals of timesteps: one value that both the training sampler and the router read."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator

import attrs
import torch

from moediff.errors import DataError, OptionError


def _cuts(cuts: Iterable[int]) -> tuple[int, ...]:
    return tuple(int(cut) for cut in cuts)


@attrs.frozen
class Intervals:
    """N half-open intervals that cover [0, T): cut points 0 = c0 < c1 < ... < cN = T.

    Raises:
        OptionError: the cut points do not start at 0 or do not strictly increase.
    """

    cuts: tuple[int, ...] = attrs.field(converter=_cuts)

    @cuts.validator
    def _check(self, attribute: attrs.Attribute[tuple[int, ...]], cuts: tuple[int, ...]) -> None:
        rising = all(low < high for low, high in itertools.pairwise(cuts))
        if len(cuts) < 2 or cuts[0] != 0 or not rising:
            raise OptionError(
                f"cuts: got {cuts}; allowed are strictly increasing integers that start at 0 and "
                "end at the number of training timesteps, for example (0, 500, 1000)."
            )

    @classmethod
    def uniform(cls, total: int, count: int) -> Intervals:
        """Split [0, total) into `count` intervals whose lengths differ by one at most."""
        if not 1 <= count <= total:
            raise OptionError(
                f"experts: got {count}; allowed is 1 to {total}, the number of timesteps. "
                "Ask for fewer experts."
            )
        return cls(tuple(total * k // count for k in range(count + 1)))

    @property
    def total(self) -> int:
        """T, the number of training timesteps."""
        return self.cuts[-1]

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self.cuts, self.cuts[1:], strict=False))

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.cuts[:-1][index], self.cuts[1:][index]

    def route(self, timestep: float | torch.Tensor) -> int | torch.Tensor:
        """Return the interval that holds a timestep; t = T belongs to the last one.

        Args:
            timestep: an int, a float, or a tensor of shape () or (B,) on any device. Hand it over
                before any cast: rounding to bfloat16 can carry it across a cut.

        Returns:
            An int for a scalar; for shape (B,) a long tensor (B,) on the same device.

        Raises:
            DataError: a timestep is NaN or outside [0, T].
        """
        if isinstance(timestep, torch.Tensor) and timestep.ndim:
            values = timestep.detach().to(device="cpu", dtype=torch.float64)
            outside = ~((values >= 0) & (values <= self.total))
            if outside.any():
                raise self._outside(float(values[outside][0]))
            inner = torch.tensor(self.cuts[1:-1], dtype=torch.float64)
            return torch.bucketize(values, inner, right=True).to(timestep.device)
        value = float(timestep)
        if not 0 <= value <= self.total:
            raise self._outside(value)
        return min(bisect.bisect_right(self.cuts, value), len(self)) - 1

    def _outside(self, value: float) -> DataError:
        return DataError(
            f"timestep: got {value}; allowed is 0 to {self.total}. Hand over the timesteps of a "
            "scheduler that was trained with this many timesteps."
        )

    def sample(
        self, count: int, generator: torch.Generator, expert: int | None = None
    ) -> torch.Tensor:
        """Draw `count` integer timesteps (count,), uniform over one interval or over [0, T)."""
        low, high = (0, self.total) if expert is None else self[expert]
        return torch.randint(low, high, (count,), generator=generator)
