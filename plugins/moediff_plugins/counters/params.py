"""Count parameters, the budget of MoEDM (its Table 1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import attrs
from torch import nn

from moediff.anatomy import Slice
from moediff.cost import Cost, CostModel, cost_model
from moediff.subject import Subject


@attrs.frozen
class Params:
    """Count the elements of all parameters, each shared tensor once (MoEDM's ratio, Table 1).

    `by_operator` is by kind of module, for example "Conv2d".
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prices"})

    def count(self, denoiser: nn.Module, shape: Sequence[int] | None = None) -> Cost:
        """The number of parameter elements; the samples' `shape` does not matter."""
        kinds: Counter[str] = Counter()
        own: dict[str, float] = {}
        seen: set[int] = set()
        for path, module in denoiser.named_modules():
            new = {id(p): p.numel() for p in module.parameters(recurse=False) if id(p) not in seen}
            seen.update(new)
            if new:
                own[path] = sum(new.values())
                kinds[type(module).__name__] += sum(new.values())
        return Cost(sum(own.values()), "params", dict(kinds), own)

    def price(self, subject: Subject) -> CostModel:
        cost = self.count(subject.denoiser)
        widths = {
            name: float(sum(_sliced(subject.denoiser, place) for place in width.slices))
            for name, width in subject.anatomy.widths.items()
        }
        return cost_model(subject, cost.unit, cost.value, cost.by_module, widths)


def _sliced(denoiser: nn.Module, place: Slice) -> int:
    """Elements of the tensors that shrink with a slice."""
    module = denoiser.get_submodule(place.module)
    names = ("weight", "bias") if place.side == "out" else ("weight",)
    tensors = [getattr(module, name) for name in names]
    return sum(tensor.numel() for tensor in tensors if tensor is not None)
