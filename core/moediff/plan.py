"""Plans: intervals, one blueprint per interval, and which layers the experts share. Plain data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

from moediff.anatomy import Anatomy
from moediff.errors import PlanError, UnknownNameError, did_you_mean
from moediff.timesteps import Intervals

if TYPE_CHECKING:
    from moediff.cost import CostModel
    from moediff.sampling import Sampling

REST = "*"
"""The entry of a copies table that stands for every module outside the layers it names."""


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names))


def _table(rows: Mapping[str, Iterable[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(sorted(rows[name])) for name in sorted(rows)}


def _numbers(rows: Mapping[str, Iterable[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(rows[name]) for name in sorted(rows)}


def _blueprints(blueprints: Iterable[Blueprint]) -> tuple[Blueprint, ...]:
    return tuple(blueprints)


@attrs.frozen
class Blueprint:
    """The units that one expert keeps: layers that are dropped, and what other widths keep.

    Attributes:
        drop: names of dropped layers.
        keep: width name -> kept positions, increasing; a width that is not named is kept whole.
    """

    drop: tuple[str, ...] = attrs.field(default=(), converter=_sorted)
    keep: Mapping[str, tuple[int, ...]] = attrs.field(factory=dict, converter=_table, hash=False)

    @classmethod
    def from_mask(cls, anatomy: Anatomy, mask: torch.Tensor) -> Blueprint:
        """Read a mask (U,); values above one half stay. Widths of dropped layers are not named."""
        kept = (mask > 0.5).tolist()
        drop = {name for name, index in anatomy.layer_units.items() if not kept[index]}
        keep = {}
        for layer in anatomy.layers:
            for width in layer.widths if layer.name not in drop else ():
                positions = [k for k, open_ in enumerate(kept[anatomy.spans[width.name]]) if open_]
                if len(positions) < width.count:
                    keep[width.name] = tuple(positions)
        blueprint = cls(tuple(drop), keep)
        blueprint.check(anatomy)
        return blueprint

    def mask(self, anatomy: Anatomy) -> torch.Tensor:
        """The mask (U,) of zeros and ones in float64."""
        mask = torch.ones(len(anatomy.units), dtype=torch.float64)
        for name in self.drop:
            mask[anatomy.layer_units[name]] = 0
        for name, positions in self.keep.items():
            span = anatomy.spans[name]
            mask[span] = 0
            mask[torch.tensor(positions) + span.start] = 1
        return mask

    def layer(self, anatomy: Anatomy, name: str) -> tuple[object, ...]:
        """What this blueprint says of one layer, to compare it between experts."""
        if name in self.drop:
            return ("dropped",)
        # A width that is named with all of its positions is kept whole, as one that is not named.
        return tuple(
            None if kept is None or len(kept) == width.count else kept
            for width in anatomy.layer(name).widths
            for kept in (self.keep.get(width.name),)
        )

    def check(self, anatomy: Anatomy) -> None:
        """Raise `PlanError` or `UnknownNameError` if this blueprint does not fit the anatomy."""
        for name in self.drop:
            if name not in anatomy.layer_units:
                raise UnknownNameError(
                    f"drop: got {name!r}, which is not a layer that can be dropped."
                    f"{did_you_mean(name, anatomy.layer_units)}"
                )
        for name, positions in self.keep.items():
            if name not in anatomy.widths:
                raise UnknownNameError(f"keep: got {name!r}.{did_you_mean(name, anatomy.widths)}")
            count = anatomy.widths[name].count
            distinct = len(set(positions)) == len(positions)
            if not positions or not distinct or positions[0] < 0 or positions[-1] >= count:
                raise PlanError(
                    f"keep[{name!r}]: got {positions}; allowed are one or more distinct positions "
                    f"from 0 to {count - 1}. To keep none, drop the layer."
                )


@attrs.frozen
class Plan:
    """Intervals, one blueprint per interval, and which layers the experts share.

    Attributes:
        intervals: N intervals.
        blueprints: N blueprints.
        copies: layer name -> one copy number per expert; equal numbers are the same module.
            The entry "*" is for everything that is not named. Numbers start at 0 and never fall,
            so a copy serves consecutive intervals.

    Raises:
        PlanError: lengths differ, or experts that share a layer disagree about it.
    """

    intervals: Intervals
    blueprints: tuple[Blueprint, ...] = attrs.field(converter=_blueprints)
    copies: Mapping[str, tuple[int, ...]] = attrs.field(
        factory=dict, converter=_numbers, hash=False
    )

    def __attrs_post_init__(self) -> None:
        count = len(self.intervals)
        if len(self.blueprints) != count:
            raise PlanError(
                f"blueprints: got {len(self.blueprints)}; allowed is {count}, one per interval."
            )
        for name, numbers in self.copies.items():
            steps = [high - low for low, high in itertools.pairwise(numbers)]
            if len(numbers) != count or numbers[:1] != (0,) or any(s not in (0, 1) for s in steps):
                raise PlanError(
                    f"copies[{name!r}]: got {numbers}; allowed are {count} numbers that start at 0 "
                    "and rise by 0 or 1, for example (0, 0, 1, 1)."
                )

    def copy_numbers(self, part: str) -> tuple[int, ...]:
        """The copy of a layer (or of `REST`) that each of the N experts uses."""
        default = self.copies.get(REST, (0,) * len(self.intervals))
        return self.copies.get(part, default)

    def masks(self, anatomy: Anatomy) -> torch.Tensor:
        """The blueprints' masks (N, U)."""
        return torch.stack([blueprint.mask(anatomy) for blueprint in self.blueprints])

    def check(self, anatomy: Anatomy) -> None:
        """Raise if this plan does not fit the anatomy or sharing experts disagree."""
        for blueprint in self.blueprints:
            blueprint.check(anatomy)
        for name in self.copies:
            if name != REST:
                anatomy.layer(name)
        for layer in anatomy.layers:
            said: dict[int, tuple[object, ...]] = {}
            numbers = self.copy_numbers(layer.name)
            for number, blueprint in zip(numbers, self.blueprints, strict=True):
                content = blueprint.layer(anatomy, layer.name)
                if said.setdefault(number, content) != content:
                    raise PlanError(
                        f"{layer.name}: experts that share copy {number} keep different units; "
                        "give them equal blueprints for this layer or copies of their own."
                    )

    def check_separate(self, anatomy: Anatomy, denoisers: Sequence[object]) -> None:
        """Raise if experts with denoisers of their own share a layer: all but one would be lost.

        Args:
            anatomy: of the base model.
            denoisers: N, equal objects where experts have not been trained apart.

        Raises:
            PlanError: they do.
        """
        for part in (REST, *(layer.name for layer in anatomy.layers)):
            numbers, sources = self.copy_numbers(part), dict[int, object]()
            for number, denoiser in zip(numbers, denoisers, strict=True):
                if sources.setdefault(number, denoiser) is not denoiser:
                    raise PlanError(
                        f"copies[{part!r}]: got {numbers}, but experts of copy {number} have been "
                        "trained apart, and all but one of them would be lost. Give each its own: "
                        f"copies={{{REST!r}: {tuple(range(len(numbers)))}}}."
                    )

    def cost(self, prices: CostModel, sampling: Sampling) -> dict[str, float]:
        """The mean cost of a call ("live") and the cost of every copy ("stored").

        Args:
            prices: what a counter says of the base model (`counter.price(subject)`).
            sampling: decides how often each expert is called.
        """
        masks = self.masks(prices.anatomy)
        calls = sampling.calls(prices.scheduler, self.intervals)
        return {
            "live": float(prices.total(masks, calls)),
            "stored": float(prices.stored(masks, self.copy_numbers)),
        }

    def diff(self, other: Plan) -> tuple[str, ...]:
        """One line per difference, empty when the plans are equal."""
        lines = []
        if self.intervals != other.intervals:
            lines.append(f"intervals: {self.intervals.cuts} -> {other.intervals.cuts}")
        for index, (mine, theirs) in enumerate(
            zip(self.blueprints, other.blueprints, strict=False)
        ):
            for name in sorted(set(mine.drop) ^ set(theirs.drop)):
                change = "dropped -> kept" if name in mine.drop else "kept -> dropped"
                lines.append(f"expert {index}: {name}: {change}")
            for name in sorted(set(mine.keep) | set(theirs.keep)):
                old, new = mine.keep.get(name, "all"), theirs.keep.get(name, "all")
                if old != new:
                    lines.append(f"expert {index}: {name}: {old} -> {new}")
        for name in sorted(set(self.copies) | set(other.copies)):
            before, after = self.copies.get(name), other.copies.get(name)
            if before != after:
                lines.append(f"copies: {name}: {before} -> {after}")
        return tuple(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data, fit for `json.dumps` and for editing by hand."""
        return {
            "cuts": list(self.intervals.cuts),
            "blueprints": [
                {"drop": list(b.drop), "keep": {k: list(v) for k, v in b.keep.items()}}
                for b in self.blueprints
            ],
            "copies": {name: list(numbers) for name, numbers in self.copies.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Plan:
        """Read what `to_json` wrote, as data or as text.

        Raises:
            PlanError: keys are missing or unknown.
        """
        try:
            content: Mapping[str, Any] = json.loads(data) if isinstance(data, str) else data
        except ValueError as error:
            raise PlanError(f"plan: is not valid JSON ({error}).") from error
        if not isinstance(content, Mapping):
            raise PlanError(f"plan: got a {type(content).__name__}; allowed is a JSON object.")
        if set(content) != {"cuts", "blueprints", "copies"}:
            raise PlanError(
                f"plan: got the keys {sorted(content)}; allowed are exactly blueprints, copies "
                "and cuts."
            )
        for entry in content["blueprints"]:
            if set(entry) != {"drop", "keep"}:
                raise PlanError(
                    f"blueprint: got the keys {sorted(entry)}; allowed are exactly drop and keep."
                )
        blueprints = tuple(Blueprint(**entry) for entry in content["blueprints"])
        return cls(Intervals(content["cuts"]), blueprints, content["copies"])
