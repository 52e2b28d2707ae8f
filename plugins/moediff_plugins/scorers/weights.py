"""What the scorers by weight share: which weights belong to a unit and to a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from moediff.anatomy import Layer, Width
from moediff.errors import AnatomyError
from moediff.subject import Subject

Pick = Callable[[torch.Tensor], torch.Tensor]
"""What is measured of a weight: itself, or its gradient."""


def norm_per_weight(expert: Subject, pick: Pick, p: float = 1.0) -> torch.Tensor:
    """The scores (U,) in float64: the norm (mean |w|^p)^(1/p) of every unit's and layer's weights.

    A unit of ResBlock channels has the convolution rows that produce them, an attention head the
    rows of its query, key and value projections, a layer all weights of its convolutions and
    linear modules. Biases and normalisation do not count.
    """

    def norm(rows: Iterable[torch.Tensor]) -> torch.Tensor:
        powers = torch.cat([row.detach().cpu().double().abs() ** p for row in rows], dim=1)
        return powers.mean(1) ** (1 / p)  # (K, weights) -> (K,)

    anatomy = expert.anatomy
    values = torch.zeros(len(anatomy.units), dtype=torch.float64)
    for layer in anatomy.layers:
        for width in layer.widths:
            values[anatomy.spans[width.name]] = norm(_of_units(expert.denoiser, width, pick))
        if layer.droppable:
            own = norm(_of_layer(expert.denoiser, layer, pick))
            values[anatomy.layer_units[layer.name]] = own.squeeze(0)
    return values


def _of_units(denoiser: nn.Module, width: Width, pick: Pick) -> list[torch.Tensor]:
    """The weights (count, weights per unit) of every module that produces a width."""
    makers = [
        (place, module)
        for place in width.slices
        if place.side == "out"
        and isinstance(module := denoiser.get_submodule(place.module), (nn.Conv2d, nn.Linear))
    ]
    # What a convolution produces, an embedding's projection only shifts: channels are sorted by
    # their convolution (DiffPruning, Sec. 3.4).
    convolutions = [pair for pair in makers if isinstance(pair[1], nn.Conv2d)]
    if not makers:
        raise AnatomyError(
            f"{width.name}: no convolution or linear module has this width on its out side, so it "
            "has no weights to score. Correct the anatomy or use another scorer."
        )
    return [
        pick(module.weight).view(place.blocks, width.count, -1).transpose(0, 1).flatten(1)
        for place, module in convolutions or makers
    ]


def weighted_modules(denoiser: nn.Module, layer: Layer) -> list[nn.Conv2d | nn.Linear]:
    """A layer's convolutions and linear modules."""
    return [
        module
        for path in layer.modules
        for module in denoiser.get_submodule(path).modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]


def _of_layer(denoiser: nn.Module, layer: Layer, pick: Pick) -> list[torch.Tensor]:
    """All weights of a layer's convolutions and linear modules, each (1, weights)."""
    return [pick(m.weight).reshape(1, -1) for m in weighted_modules(denoiser, layer)]
