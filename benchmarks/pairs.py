"""How much slower one thing is than another, measured side by side until the spread is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moediff_plugins.clock import paired_ratios


def paired_ratio(
    slow: Callable[[], Any],
    fast: Callable[[], Any],
    *,
    pairs: int = 60,
    least: int = 7,
    spread: float = 0.05,
) -> tuple[float, float, float]:
    """Time two calls on the CPU in interleaved pairs; return the ratio slow / fast.

    Make a call long enough for the clock (a millisecond or more); loop inside it if it is not.

    Args:
        slow: what is expected to take longer.
        fast: what it is compared with.
        pairs: stop after so many pairs, whatever the spread.
        least: run at least so many pairs.
        spread: stop once the quartiles lie closer together than this share of the median.

    Returns:
        The median of the pairs' ratios, the lower and the upper quartile.
    """
    ratios: list[float] = []
    for ratio in paired_ratios(slow, fast):
        ratios.append(ratio)
        low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        if len(ratios) >= pairs or (len(ratios) >= least and high - low < spread * median):
            break
    return float(median), float(low), float(high)
