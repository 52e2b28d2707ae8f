"""What the checks run on: denoisers of a few thousand parameters, a few images, a short run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel

from moediff.cost import Cost, CostModel, cost_model
from moediff.plan import REST, Blueprint, Plan
from moediff.registry import installed
from moediff.sampling import Sampling
from moediff.space import Chain, Scores, SearchSpace
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run

TIMESTEPS = 100
CUTS = (0, 40, TIMESTEPS)
CLASSES = 3

KINDS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "conditional": {
        "in_channels": 1,
        "out_channels": 1,
        "num_class_embeds": CLASSES + 1,
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
}
"""Two denoisers that differ wherever a strategy has to know."""


def tiny_unet(kind: str = "plain") -> UNet2DModel:
    """A `UNet2DModel` on 8x8 images, in eval mode; `kind` is one of `KINDS`."""
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet2DModel(**config, **KINDS[kind]).eval()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.ndim == 1:  # zeros and ones would hide what a bias leaks
                    parameter += 0.2 * torch.randn(parameter.shape)
    return net


def tiny_subject(kind: str = "plain") -> Subject:
    """A tiny denoiser with its anatomy and a schedule of 100 timesteps."""
    scheduler = DDPMScheduler(num_train_timesteps=TIMESTEPS)
    return installed().dissect(tiny_unet(kind), scheduler)


def tiny_task(kind: str = "plain") -> Task:
    """Twelve random images, labelled for the class-conditional denoiser."""
    rng = np.random.default_rng(0)
    if kind == "plain":
        return Task.from_arrays(rng.uniform(-1, 1, (12, 8, 8, 3)).astype(np.float32))
    images = rng.uniform(-1, 1, (12, 8, 8, 1)).astype(np.float32)
    return Task.from_arrays(images, rng.integers(0, CLASSES, 12), null_label=CLASSES)


def tiny_run(kind: str = "plain", experts: int = 2) -> Run:
    """A run that keeps nothing; guided where the denoiser takes classes."""
    guidance = 1.0 if kind == "plain" else 2.0
    return Run(sampling=Sampling("ddim", steps=2, guidance=guidance), experts=experts)


def tiny_scores(subject: Subject, flip: bool = False) -> Scores:
    """Scores (U,) that are all different."""
    values = torch.arange(1.0, len(subject.anatomy.units) + 1, dtype=torch.float64)
    return Scores(values.flip(0) if flip else values)


def tiny_space(subject: Subject, flip: bool = False) -> SearchSpace:
    """Every width as a chain, and one chain with all layers that can be dropped."""
    anatomy, scores = subject.anatomy, tiny_scores(subject, flip)
    rank = scores.values.tolist().__getitem__
    chains = [
        Chain(name, tuple(sorted(range(span.start, span.stop), key=rank)))
        for name, span in anatomy.spans.items()
    ]
    layers = Chain("layers", tuple(sorted(anatomy.layer_units.values(), key=rank)))
    return SearchSpace(anatomy, (*chains, layers), scores)


def tiny_plan(subject: Subject) -> Plan:
    """Two experts: most layers shared and cut, one width different, one layer dropped in both."""
    anatomy = subject.anatomy
    names = list(anatomy.widths)
    drop = [name for name, index in anatomy.layer_units.items() if index][-1:]
    shared = {name: range(1, anatomy.widths[name].count) for name in names[1:]}
    kept = {n: tuple(v) for n, v in shared.items() if v and not n.startswith(f"{drop[0]}.")}
    blueprints = (Blueprint(drop, kept), Blueprint(drop, {**kept, names[0]: (0, 1)}))
    layer = anatomy.layers[0].name
    numbers = {REST: (0, 0), layer: (0, 1), anatomy.layers[1].name: (0, 1)}
    return Plan(Intervals.uniform(subject.total, 2), blueprints, numbers)


def tiny_blueprints(subject: Subject, single: bool) -> list[Blueprint]:
    """The smallest sub-network, three at random, and `single` changes: each layer, each width."""
    anatomy = subject.anatomy
    found: list[Blueprint] = []
    if single:
        found += [Blueprint((name,)) for name in anatomy.layer_units]
        found += [Blueprint((), {n: (w.count - 1,)}) for n, w in anatomy.widths.items()]
    found.append(Blueprint((), dict.fromkeys(anatomy.widths, (0,))))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        mask = (torch.rand(len(anatomy.units), generator=generator) > 0.4).double()
        for span in anatomy.spans.values():
            mask[span.start] = 1  # at least one unit of each width stays
        found.append(Blueprint.from_mask(anatomy, mask))
    return found


@attrs.frozen
class Elements:
    """Count parameter elements: the counter that gates are checked with."""

    def count(self, denoiser: torch.nn.Module, shape: Sequence[int] | None = None) -> Cost:
        own = {
            path: float(sum(p.numel() for p in module.parameters(recurse=False)))
            for path, module in denoiser.named_modules()
        }
        return Cost(sum(own.values()), "elements", {}, own)

    def price(self, subject: Subject) -> CostModel:
        cost, widths = self.count(subject.denoiser), {}
        for name, width in subject.anatomy.widths.items():
            sliced = 0
            for place in width.slices:
                module = subject.denoiser.get_submodule(place.module)
                tensors = dict(module.named_parameters(recurse=False))
                sliced += sum(
                    v.numel() for k, v in tensors.items() if place.side == "out" or k == "weight"
                )
            widths[name] = float(sliced)
        return cost_model(subject, cost.unit, cost.value, cost.by_module, widths)
