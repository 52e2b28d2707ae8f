"""Remove channels, heads and the last layer of each stage (DiffPruning Sec. 3.4-3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs

from moediff.anatomy import Anatomy
from moediff.mixture import ExpertMixture
from moediff.plan import Chain, Plan, Scores, SearchSpace
from moediff.subject import Subject


@attrs.frozen
class Structural:
    """Width units by score, and a ranked list of depth layers (DiffPruning Sec. 3.4, Supp. 2.3).

    Every width is a chain, its lowest score removed first. The last layers of each stage of the
    down and the up branch form one more chain: the deepest stage goes first, and within a stage
    the encoder's layer before the decoder's, the order that the supplement found to cost least.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"layers", "widths"})

    def space(self, expert: Subject, scores: Scores) -> SearchSpace:
        anatomy = expert.anatomy
        values = scores.values.tolist()
        chains = [
            Chain(name, tuple(sorted(range(span.start, span.stop), key=values.__getitem__)))
            for name, span in anatomy.spans.items()
        ]
        depth = _depth_layers(anatomy)
        if depth:
            chains.append(Chain("layers", depth))
        return SearchSpace(anatomy, tuple(chains), scores)

    def prune(self, experts: Sequence[Subject], plan: Plan) -> ExpertMixture:
        return ExpertMixture.from_experts(experts, plan)


def _depth_layers(anatomy: Anatomy) -> tuple[int, ...]:
    """Unit indices of the last layer of each stage of both branches, in order of removal."""
    last = {(layer.stage, layer.branch): layer.name for layer in anatomy.layers if layer.droppable}
    ranked = sorted(
        (key for key in last if key[1] != "mid"), key=lambda key: (-key[0], key[1] == "up")
    )
    return tuple(anatomy.layer_units[last[key]] for key in ranked)
