"""What the tuners' tests share: a task that is quickly learned, a small mixture, its weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import moediff
from moediff.plan import REST, Blueprint, Plan

Weights = dict[str, torch.Tensor]
FAST: dict[str, Any] = {"batch": 8, "learning_rate": 3e-3, "warmup": 0.0}
TINY: dict[str, Any] = {**FAST, "batch": 2}


def colours() -> moediff.Task:
    """Images of one colour each: something that a tiny denoiser learns in a second."""
    drawn = np.random.default_rng(0).choice([-0.8, 0.8], (32, 1, 1, 3)).astype(np.float32)
    return moediff.Task.from_arrays(np.broadcast_to(drawn, (32, 8, 8, 3)).copy())


def weights(module: nn.Module) -> Weights:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def build(subject: moediff.Subject, count: int = 2, **changes: Any) -> moediff.ExpertMixture:
    """N experts without their middle layers; layers have copies, and what is outside is shared."""
    intervals = moediff.Intervals.uniform(1000, count)
    names = [layer.name for layer in subject.anatomy.layers]
    copies = {REST: (0,) * count, **{name: tuple(range(count)) for name in names}, **changes}
    blueprint = Blueprint(drop=("mid_block.resnets.0", "mid_block.resnets.1"))
    plan = Plan(intervals, [blueprint] * count, copies)
    return moediff.ExpertMixture.from_experts(subject.split(intervals), plan)
