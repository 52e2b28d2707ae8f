"""Remove channels, heads and the last layer of each stage (DiffPruning Sec. 3.4-3.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import attrs
from attrs.validators import ge, instance_of

from moediff.anatomy import Anatomy
from moediff.mixture import ExpertMixture
from moediff.plan import Plan
from moediff.space import Chain, Scores, SearchSpace
from moediff.subject import Subject


@attrs.frozen
class Structural:
    """Width units by score, and a ranked list of depth layers (DiffPruning Sec. 3.4, Supp. 2.3).

    Every width is a chain, its lowest score removed first. The last layers of each stage of the
    down and the up branch form one more chain: the deepest stage goes first, and within a stage
    the encoder's layer before the decoder's, the order that the supplement found to cost least.

    Attributes:
        round_to: a width keeps a multiple of so many channels that whole units can reach (of units
            of 7 channels and 8: multiples of 56), or all. Units then go several at a time, and
            where the first multiple is the whole width, none goes. 1 is off. On a CPU with AVX-512
            a ResBlock's two convolutions took 1.5 times as long with 161 channels as with 168.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"layers", "widths"})

    round_to: int = attrs.field(default=1, validator=[instance_of(int), ge(1)])

    def space(self, expert: Subject, scores: Scores) -> SearchSpace:
        anatomy = expert.anatomy
        values = scores.values.tolist()
        chains = [
            Chain(
                name,
                tuple(sorted(range(span.start, span.stop), key=values.__getitem__)),
                stride=self.round_to // math.gcd(self.round_to, anatomy.widths[name].size),
            )
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
