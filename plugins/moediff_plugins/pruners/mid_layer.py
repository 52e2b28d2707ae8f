"""Drop whole layers, those with the most channels first (MoEDM Sec. 3.2, "Discard Layers")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs

from moediff.mixture import ExpertMixture
from moediff.plan import Plan
from moediff.space import Chain, Scores, SearchSpace
from moediff.subject import Subject


@attrs.frozen
class MidLayer:
    """Rank layers by channel count, then by score, then in network order (MoEDM Sec. 3.1-3.2).

    The layers with the most channels, the mid-layers, hold most of the parameters and matter
    least. Widths are left whole. The layer that would be dropped last always stays.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"layers"})

    def space(self, expert: Subject, scores: Scores) -> SearchSpace:
        anatomy = expert.anatomy
        values = scores.values.tolist()
        layers = [layer for layer in anatomy.layers if layer.droppable]
        layers.sort(key=lambda layer: (-layer.channels, values[anatomy.layer_units[layer.name]]))
        chain = Chain("layers", tuple(anatomy.layer_units[layer.name] for layer in layers))
        return SearchSpace(anatomy, (chain,), scores)

    def prune(self, experts: Sequence[Subject], plan: Plan) -> ExpertMixture:
        return ExpertMixture.from_experts(experts, plan)
