"""How much slower one thing is than another, measured side by side until the spread is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def paired_ratio(
    slow: Callable[[], Any],
    fast: Callable[[], Any],
    *,
    pairs: int = 60,
    least: int = 7,
    spread: float = 0.05,
) -> tuple[float, float, float]:
    """Time two calls in interleaved pairs; return the ratio slow / fast.

    A pair runs close together, so that whatever else the machine does hits both, and its order
    alternates, so that neither profits from going second. Both calls run once before, unmeasured.
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
    slow(), fast()
    ratios: list[float] = []
    while len(ratios) < pairs:
        if len(ratios) % 2:
            after = _seconds(fast)
            ratios.append(_seconds(slow) / after)
        else:
            before = _seconds(slow)
            ratios.append(before / _seconds(fast))
        low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        if len(ratios) >= least and high - low < spread * median:
            break
    return float(median), float(low), float(high)
