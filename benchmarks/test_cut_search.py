"""The exact search for cut points at full resolution: T = 1000 timesteps, N = 8 experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from moediff_plugins.clusterers.cuts import best_cuts


def test_cut_search_takes_less_than_a_second(benchmark: Any) -> None:
    cuts = (0, 90, 200, 330, 480, 640, 810, 900, 1000)
    label = np.searchsorted(cuts[1:-1], np.arange(1000), side="right")
    noise = np.random.default_rng(0).normal(scale=0.3, size=(1000, 1000))
    similarity = 0.4 * (label[:, None] == label[None, :]) + (noise + noise.T) / 2
    found, _ = benchmark.pedantic(best_cuts, args=(similarity, 8), rounds=9, warmup_rounds=1)
    assert found == cuts
    assert benchmark.stats.stats.median < 1
