"""The anatomy of a denoiser: its layers and units by name, and what each one touches.

Plain data. An anatomy strategy writes it down once for a class of models; masking, surgery and
pricing then work on any model without knowing its class.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import attrs

from moediff.errors import UnknownNameError, did_you_mean

Branch = Literal["down", "mid", "up"]
BypassKind = Literal["identity", "shortcut", "previous"]


@attrs.frozen
class Slice:
    """The place of a width's channels in one convolution, linear or normalisation module.

    `side` is the axis that shrinks: "out" (weight rows, bias, normalisation channels) or "in"
    (weight columns). `blocks` counts how often all channels stand one after the other, for
    example 2 where one projection makes a scale and a shift.
    """

    module: str
    side: Literal["out", "in"]
    blocks: int = 1


@attrs.frozen
class Width:
    """`count` interchangeable units of `size` channels each, all in one place of one layer.

    A unit is closed by multiplying its channels to zero at the input of `consumer`, along `axis`.
    It is removed by shrinking every slice. `core` names modules whose own operators (an
    attention's matrix products) shrink with the width though they hold no parameters of it, and
    `attributes` are (module, attribute, value per unit) triples to reset after a cut.
    """

    name: str
    kind: Literal["groups", "heads", "hidden"]
    count: int
    size: int
    consumer: str
    axis: int
    slices: tuple[Slice, ...]
    core: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str, int], ...] = ()


@attrs.frozen
class Layer:
    """One ResBlock with its attention, if it has one.

    `modules` run one after the other and are gated as one composition. What stays when the layer
    is dropped is `bypass`: its input ("identity"), its own 1x1 convolution ("shortcut", the path
    of which is `shortcut`), or the first `channels` channels of its input ("previous": an up
    layer passes on the previous feature map without the skip, DiffPruning Eq. 11).
    """

    name: str
    stage: int
    branch: Branch
    channels: int
    modules: tuple[str, ...]
    widths: tuple[Width, ...]
    droppable: bool = True
    bypass: BypassKind = "identity"
    shortcut: str | None = None


@attrs.frozen
class Unit:
    """The smallest thing that can be removed: one position of a width, or a layer (no width)."""

    layer: str
    width: str | None = None
    position: int = 0

    @property
    def name(self) -> str:
        return self.layer if self.width is None else f"{self.width}[{self.position}]"


@attrs.frozen
class Anatomy:
    """All layers of a denoiser in network order.

    Units are numbered layer by layer: first the layer itself, if it can be dropped, then its
    widths. Every vector of length U in moediff follows this order.
    """

    layers: tuple[Layer, ...]

    @functools.cached_property
    def units(self) -> tuple[Unit, ...]:
        """All U units, in order."""
        return tuple(self._walk())

    def _walk(self) -> Iterator[Unit]:
        for layer in self.layers:
            if layer.droppable:
                yield Unit(layer.name)
            for width in layer.widths:
                yield from (Unit(layer.name, width.name, k) for k in range(width.count))

    @functools.cached_property
    def widths(self) -> dict[str, Width]:
        """Every width by name."""
        return {width.name: width for layer in self.layers for width in layer.widths}

    @functools.cached_property
    def spans(self) -> dict[str, slice]:
        """Where each width's units stand in a vector of length U."""
        start: dict[str, int] = {}
        for index, unit in enumerate(self.units):
            if unit.width is not None:
                start.setdefault(unit.width, index)
        return {name: slice(at, at + self.widths[name].count) for name, at in start.items()}

    @functools.cached_property
    def layer_units(self) -> dict[str, int]:
        """The index of each droppable layer's own unit."""
        return {unit.layer: i for i, unit in enumerate(self.units) if unit.width is None}

    @functools.cached_property
    def layer_index(self) -> dict[str, int]:
        """The position of each layer in network order."""
        return {layer.name: i for i, layer in enumerate(self.layers)}

    def layer(self, name: str) -> Layer:
        """Return a layer by name.

        Raises:
            UnknownNameError: no such layer.
        """
        if name not in self.layer_index:
            raise UnknownNameError(f"layer: got {name!r}.{did_you_mean(name, self.layer_index)}")
        return self.layers[self.layer_index[name]]
