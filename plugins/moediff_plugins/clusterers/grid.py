"""The grid on which clusterers read the timesteps."""

from __future__ import annotations

from moediff.errors import OptionError
from moediff.timesteps import Intervals


def grid(total: int, stride: int, experts: int) -> tuple[Intervals, list[int]]:
    """Return G = ceil(T / stride) even cells of [0, T) and the timestep in the middle of each.

    Raises:
        OptionError: there are fewer cells than experts.
    """
    cells = Intervals.uniform(total, -(-total // stride))
    if len(cells) < experts:
        raise OptionError(
            f"stride: got {stride}, which makes {len(cells)} cells of the {total} "
            f"timesteps; {experts} experts need at least as many. Set stride to at most "
            f"{(total - 1) // (experts - 1)}, or ask for fewer experts."
        )
    return cells, [(low + high) // 2 for low, high in cells]
