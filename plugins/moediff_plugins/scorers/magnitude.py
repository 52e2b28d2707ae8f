"""Score units by the norm of the weights that produce them (DiffPruning's elastic order)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs
import torch
from attrs.validators import gt, lt
from torch import nn

from moediff.anatomy import Layer, Width
from moediff.errors import AnatomyError
from moediff.plan import Scores
from moediff.subject import Subject
from moediff.task import Task
from moediff.workdir import Run


@attrs.frozen
class Magnitude:
    """Score by the L1 norm of the weights (Li et al., 2017; DiffPruning, Sec. 3.4).

    A unit of ResBlock channels has the convolution rows that produce them, an attention head
    the rows of its query, key and value projections, a layer all weights of its convolutions and
    linear modules. A score is the norm per weight, (mean |w|^p)^(1/p); the units of a width have
    equally many weights, so their order is that of the plain norm. Biases and normalisation do
    not count. Scores rank units inside one layer only.

    Attributes:
        p: the norm; 1 in both papers.
    """

    p: float = attrs.field(default=1.0, converter=float, validator=[gt(0), lt(math.inf)])

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        anatomy = expert.anatomy
        values = torch.zeros(len(anatomy.units), dtype=torch.float64)
        for layer in anatomy.layers:
            for width in layer.widths:
                values[anatomy.spans[width.name]] = self._norm(_unit_rows(expert.denoiser, width))
            if layer.droppable:
                rows = _layer_rows(expert.denoiser, layer)
                values[anatomy.layer_units[layer.name]] = self._norm(rows).squeeze(0)
        return Scores(values, comparable=False)

    def _norm(self, rows: Iterable[torch.Tensor]) -> torch.Tensor:
        """Tensors (K, ...) of weights -> one norm per weight for each of K rows, (K,)."""
        powers = torch.cat([row.detach().cpu().double().abs() ** self.p for row in rows], dim=1)
        return powers.mean(1) ** (1 / self.p)


def _unit_rows(denoiser: nn.Module, width: Width) -> list[torch.Tensor]:
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
        module.weight.view(place.blocks, width.count, -1).transpose(0, 1).flatten(1)
        for place, module in convolutions or makers
    ]


def _layer_rows(denoiser: nn.Module, layer: Layer) -> list[torch.Tensor]:
    """All weights of a layer's convolutions and linear modules, each (1, weights)."""
    return [
        module.weight.reshape(1, -1)
        for path in layer.modules
        for module in denoiser.get_submodule(path).modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
