"""The exact search for cut points at full resolution, and what a sketched gradient costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from moediff import Run
from moediff_plugins.clusterers.cuts import best_cuts
from moediff_plugins.clusterers.sketching import CountSketch


def test_cut_search_takes_less_than_a_second(benchmark: Any) -> None:
    cuts = (0, 90, 200, 330, 480, 640, 810, 900, 1000)
    label = np.searchsorted(cuts[1:-1], np.arange(1000), side="right")
    noise = np.random.default_rng(0).normal(scale=0.3, size=(1000, 1000))
    similarity = 0.4 * (label[:, None] == label[None, :]) + (noise + noise.T) / 2
    found, _ = benchmark.pedantic(best_cuts, args=(similarity, 8), rounds=9, warmup_rounds=1)
    assert found == cuts
    assert benchmark.stats.stats.median < 1


def test_ten_million_parameters_are_sketched_in_a_quarter_of_a_second(benchmark: Any) -> None:
    parameters = {str(index): nn.Parameter(torch.zeros(1000, 1000)) for index in range(10)}
    sketch = CountSketch.of(parameters, 4096, Run().generator)
    gradient, total = torch.randn(1000, 1000), torch.zeros(4096)

    def project() -> None:
        for name in parameters:
            sketch.add(total, name, gradient, 1.0)

    benchmark.pedantic(project, rounds=9, warmup_rounds=1)
    print(f"{benchmark.stats.stats.median * 1e3:.0f} ms")
    assert benchmark.stats.stats.median < 0.25
