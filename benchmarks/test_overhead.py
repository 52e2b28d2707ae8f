"""What routing and the gate cost: a mixture's forward against calling its expert directly."""

from __future__ import annotations

import pytest
import torch

import moediff
from benchmarks.pairs import paired_ratio
from moediff import Blueprint, ExpertMixture, Intervals, Plan
from moediff_plugins import digits


@pytest.mark.parametrize("kind", ["int", "tensor"])
def test_routing_costs_at_most_two_percent(benchmark, kind):
    denoiser, scheduler = digits.load_base()
    subject = moediff.installed().dissect(denoiser, scheduler)
    plan = Plan(Intervals.uniform(1000, 2), (Blueprint(),) * 2)
    mixture = ExpertMixture.from_experts([subject, subject], plan)
    sample, labels = torch.randn(4, 1, 8, 8), torch.tensor([3, 8, 3, 8])
    timestep = 700 if kind == "int" else torch.tensor(700)
    expert = mixture.experts[1]

    def routed() -> None:
        with torch.inference_mode():
            mixture(sample, timestep, class_labels=labels)

    def direct() -> None:
        with torch.inference_mode():
            expert(sample, timestep, class_labels=labels)

    median, low, high = paired_ratio(routed, direct, pairs=400, least=100, spread=0.01)
    benchmark.extra_info.update(ratio=median, low=low, high=high)
    benchmark.pedantic(routed, rounds=5)
    print(f"mixture / expert: {median:.4f} (quartiles {low:.4f} to {high:.4f})")
    assert median <= 1.02
