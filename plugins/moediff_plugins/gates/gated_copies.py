"""What `learned-expansion` trains: layers that are shared as far as their gates are closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from moediff.plan import Blueprint
from moediff.sampling import Call
from moediff.subject import Subject
from moediff.surgery import cut


class GatedCopies(nn.Module):
    """N experts that are one cut denoiser and, in some of its layers, a gated difference.

    Args:
        experts: N, with one denoiser, which is cut and frozen.
        blueprints: N, what each expert keeps.
        layers: names of the A layers that have a gate; all experts keep the same of them.
        scale: the logits' learning rate as a multiple of the weights'.
    """

    def __init__(
        self,
        experts: Sequence[Subject],
        blueprints: Sequence[Blueprint],
        layers: Sequence[str],
        scale: float,
    ) -> None:
        super().__init__()
        anatomy = experts[0].anatomy
        # No ModuleList: the denoisers stay in eval mode, and nothing of them is trained.
        self.denoisers: list[nn.Module] = []
        for index, blueprint in enumerate(blueprints):
            first = blueprints.index(blueprint)
            small = None if first < index else cut(experts[0].denoiser, anatomy, blueprint)
            self.denoisers.append(self.denoisers[first] if small is None else small)
            self.denoisers[-1].requires_grad_(False)
        named = dict(self.denoisers[0].named_parameters())
        self.scale, self.weights = scale, []
        self.logits = nn.Parameter(torch.zeros(len(layers), device=experts[0].device))
        self.shared, self.own = nn.ParameterList(), nn.ParameterList()
        for index, layer in enumerate(layers):
            for path in anatomy.layer(layer).modules:
                for name in (n for n in named if n.startswith(f"{path}.")):
                    zeros = torch.zeros_like(named[name], dtype=torch.float32)
                    self.weights.append((index, name))
                    self.shared.append(zeros)
                    self.own.append(zeros.expand(len(experts), *zeros.shape).clone())

    def gates(self) -> torch.Tensor:
        """The gates s (A,). Logits are stored divided by `scale`, for a rate of their own."""
        return torch.sigmoid(self.scale * self.logits)

    def expert(self, index: int) -> Call:
        """Something to call as a denoiser."""
        denoiser, gates, tensors = self.denoisers[index], self.gates(), {}
        for (layer, name), shared, own in zip(self.weights, self.shared, self.own, strict=True):
            weight = denoiser.get_parameter(name)
            different = own[index] - own.mean(0)
            tensors[name] = (weight + shared + gates[layer] * different).to(weight)

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(denoiser, tensors, args, kwargs)

        return call
