"""A training-free gate: prune all experts alike, then copy layers per interval (MoEDM Eq. 2)."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping, Sequence

import attrs
import torch
from attrs.validators import ge, instance_of, optional

from moediff.allowance import Allowance
from moediff.anatomy import Anatomy
from moediff.cost import Budget
from moediff.errors import NoEffectWarning, OptionError
from moediff.plan import REST, Blueprint, Plan
from moediff.space import SearchSpace
from moediff.subject import Subject, apart
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run
from moediff_plugins.gates.discard import discard, remaining


@attrs.frozen
class OneHot:
    """Remove greedily by score per price, the same in every expert; then expand what remains.

    Super-layer i has k_i copies, each live for consecutive intervals, so that exactly one is
    active at a timestep (MoEDM Eq. 2) and the gate costs nothing at run time. Modules outside the
    layers, and experts that a tuner has already made separate, are never merged or split here.

    Attributes:
        copies: k_i for every layer; None means one copy per interval. It must divide the number
            of intervals.
        uneven: patterns of layer names (as in a shell) -> their own k_i, first match wins
            (MoEDM, Appendix D).
        outer: only this many of the layers that remain get copies, those nearest to the network's
            input and output, half from each end (Appendix D has 6 of 12); the others have one. The
            odd one is at the output. Patterns go first. None expands every layer.
    """

    copies: int | None = attrs.field(default=None, validator=optional([instance_of(int), ge(1)]))
    uneven: Mapping[str, int] = attrs.field(factory=dict, converter=dict, hash=False)
    outer: int | None = attrs.field(default=None, validator=optional([instance_of(int), ge(0)]))

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        anatomy = experts[0].anatomy
        if apart(experts) and (self.copies is not None or self.uneven or self.outer is not None):
            warnings.warn(
                "one-hot: a tuner has made the experts separate, so each has copies of its own; "
                "`copies`, `uneven` and `outer` have no effect. Leave them out, or leave out "
                "`prepare`.",
                NoEffectWarning,
                stacklevel=2,
            )
        prices = budget.counter.price(experts[0])
        calls = run.sampling.calls(experts[0].scheduler, intervals)
        expanded = self._table(experts, [layer.name for layer in anatomy.layers])

        def table_of(masks: torch.Tensor) -> dict[str, tuple[int, ...]]:
            if self.outer is None:  # the same whatever remains
                return expanded
            return self._table(experts, remaining(anatomy, masks))

        def bind(masks: torch.Tensor) -> Allowance:
            table = table_of(masks)
            return Allowance(budget, prices, calls, lambda part: table.get(part, table[REST]))

        masks = discard(spaces, bind)
        blueprints = [Blueprint.from_mask(anatomy, mask) for mask in masks]
        table = table_of(masks)
        _check_alike(anatomy, blueprints, table)
        return Plan(intervals, blueprints, table)

    def _table(self, experts: Sequence[Subject], left: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Layer name -> N copy numbers, when the layers `left` remain."""
        count = len(experts)
        if apart(experts):
            return {REST: tuple(range(count))}
        table = {REST: (0,) * count}
        inner = frozenset[str]()
        if self.outer is not None:
            middle = left[self.outer // 2 : max(0, len(left) - (self.outer + 1) // 2)]
            inner = frozenset({layer.name for layer in experts[0].anatomy.layers} - set(left))
            inner |= set(middle)
        for layer in experts[0].anatomy.layers:
            matches = [k for glob, k in self.uneven.items() if fnmatch.fnmatch(layer.name, glob)]
            usual = 1 if layer.name in inner else self.copies or count
            copies = matches[0] if matches else usual
            if copies < 1 or count % copies:
                raise OptionError(
                    f"copies: got {copies} for {layer.name}; allowed are the divisors of the "
                    f"{count} intervals. Ask for a number of experts that every k_i divides."
                )
            table[layer.name] = tuple(i * copies // count for i in range(count))
        return table


def _check_alike(
    anatomy: Anatomy, blueprints: Sequence[Blueprint], table: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse copies for several intervals of a layer that these have left with other units."""
    for layer in anatomy.layers:
        numbers = table.get(layer.name, table[REST])
        left = [blueprint.layer(anatomy, layer.name) for blueprint in blueprints]
        if len(set(zip(numbers, left, strict=True))) > len(set(numbers)):
            raise OptionError(
                f"copies: got {len(set(numbers))} for {layer.name} in {len(numbers)} intervals, "
                "which keep different units of it, because the scores are of each interval by "
                "itself. Leave `copies`, `uneven` and `outer` out, or take scores that are the "
                "same for all intervals (`by_interval=False`)."
            )
