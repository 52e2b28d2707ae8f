"""A mixture of three experts with shared, own, cut and dropped layers, and what to call it with."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler

import moediff
from moediff import Blueprint, ExpertMixture, Intervals, Plan, Subject
from moediff.plan import REST
from moediff.storage import fingerprint
from tests.conftest import tiny_unet

CUTS = Intervals((0, 300, 600, 1000))

SAMPLE = torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8)
LABELS = torch.tensor([0, 1, 2, 3])
MIXED = torch.tensor([700, 10, 300, 599])


def dissected(kind: str = "class-conditional", **changes: Any) -> Subject:
    return moediff.installed().dissect(tiny_unet(kind, **changes), DDPMScheduler())


def plan_of(subject: Subject) -> Plan:
    """Shared and own layers, cut widths and a dropped layer, in three experts."""
    anatomy = subject.anatomy
    first, second = list(anatomy.widths)[:2]
    gone = list(anatomy.layer_units)[-1]
    copies = {
        REST: (0, 0, 0),
        anatomy.layers[0].name: (0, 1, 2),
        anatomy.layers[1].name: (0, 0, 1),
        gone: (0, 1, 1),
    }
    blueprints = [
        Blueprint((), {first: (0,)}),
        Blueprint((gone,), {first: (1, 2)}),
        Blueprint((gone,)),
    ]
    if second.startswith(anatomy.layers[0].name):
        blueprints[2] = Blueprint((gone,), {second: (1,)})
    return Plan(CUTS, blueprints, copies)


def mixture_of(subject: Subject, plan: Plan | None = None) -> ExpertMixture:
    plan = plan or plan_of(subject)
    return ExpertMixture.from_experts([subject] * len(plan.intervals), plan)


def trained(mixture: ExpertMixture) -> ExpertMixture:
    """Untied, with every weight moved, so that all experts differ."""
    mixture.untie()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return mixture


def equal(first: ExpertMixture, second: ExpertMixture) -> bool:
    """Equal settings and weights, these in the same order."""
    names = [list(mixture.state_dict()) for mixture in (first, second)]
    return names[0] == names[1] and fingerprint(first) == fingerprint(second)
