"""Really remove units: shrink weights, put a bypass in place of a layer, share what is shared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moediff.anatomy import Anatomy, BypassKind, Layer, Slice, Width
from moediff.errors import AnatomyError
from moediff.plan import REST, Blueprint, Plan


class Bypass(nn.Module):
    """What stays of a dropped layer. It takes a ResBlock's place, because blocks count those."""

    def __init__(
        self, kind: BypassKind, channels: int, conv_shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.kind, self.channels, self.conv_shortcut = kind, channels, conv_shortcut

    @classmethod
    def of(cls, denoiser: nn.Module, layer: Layer) -> Bypass:
        """The bypass of a layer, around the layer's own shortcut convolution."""
        shortcut = denoiser.get_submodule(layer.shortcut) if layer.shortcut else None
        return cls(layer.bypass, layer.channels, shortcut if layer.bypass == "shortcut" else None)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(B, C, H, W) -> (B, channels, H, W); the time embedding is not used."""
        if self.conv_shortcut is not None:
            shortcut: torch.Tensor = self.conv_shortcut(hidden_states)
            return shortcut
        return hidden_states[:, : self.channels] if self.kind == "previous" else hidden_states


def _channels(width: Width, kept: Sequence[int], blocks: int) -> torch.Tensor:
    units = torch.tensor(kept)
    one = (units[:, None] * width.size + torch.arange(width.size)).flatten()
    block = torch.arange(blocks) * width.count * width.size
    return (block[:, None] + one).flatten()


SIZES: dict[tuple[type[nn.Module], str], str] = {
    (nn.Conv2d, "out"): "out_channels",
    (nn.Conv2d, "in"): "in_channels",
    (nn.Linear, "out"): "out_features",
    (nn.Linear, "in"): "in_features",
    (nn.GroupNorm, "out"): "num_channels",
}
"""The modules that can shrink on a side, and the attribute that holds that side's size."""


def _shrink(module: nn.Module, place: Slice, index: torch.Tensor, share: float) -> None:
    """Keep the channels of `index` (K,) on one side of a module; `share` of all that were there."""
    size = next(
        (
            name
            for (kind, side), name in SIZES.items()
            if isinstance(module, kind) and side == place.side
        ),
        None,
    )
    if size is None or getattr(module, "groups", 1) != 1:
        raise AnatomyError(
            f"{place.module}: cannot cut the {place.side} side of a {type(module).__name__}; "
            "allowed are ungrouped Conv2d, Linear and the out side of GroupNorm."
        )
    for name in ("weight", "bias") if place.side == "out" else ("weight",):
        old: nn.Parameter | None = getattr(module, name)
        if old is not None:
            axis = 0 if place.side == "out" else 1
            taken = old.detach().index_select(axis, index.to(old.device))
            setattr(module, name, nn.Parameter(taken, requires_grad=old.requires_grad))
    setattr(module, size, len(index))
    if isinstance(module, nn.GroupNorm):
        module.num_groups = round(module.num_groups * share)


def _cut_width(denoiser: nn.Module, width: Width, kept: Sequence[int]) -> None:
    for place in width.slices:
        index = _channels(width, kept, place.blocks)
        _shrink(denoiser.get_submodule(place.module), place, index, len(kept) / width.count)
    for path, attribute, per_unit in width.attributes:
        setattr(denoiser.get_submodule(path), attribute, per_unit * len(kept))


def cut_layer(denoiser: nn.Module, layer: Layer, blueprint: Blueprint) -> None:
    """Remove, in place, what a blueprint leaves out of one layer."""
    if layer.name in blueprint.drop:
        bypass = Bypass.of(denoiser, layer)
        denoiser.set_submodule(layer.modules[0], bypass)
        for path in layer.modules[1:]:
            denoiser.set_submodule(path, Bypass("identity", layer.channels))
        return
    for width in layer.widths:
        if width.name in blueprint.keep:
            _cut_width(denoiser, width, blueprint.keep[width.name])


def cut(denoiser: nn.Module, anatomy: Anatomy, blueprint: Blueprint) -> nn.Module:
    """Return a smaller copy of a denoiser with only what the blueprint keeps."""
    blueprint.check(anatomy)
    smaller = copy.deepcopy(denoiser)
    for layer in anatomy.layers:
        cut_layer(smaller, layer, blueprint)
    return smaller


def parts_of(denoiser: nn.Module, anatomy: Anatomy) -> list[tuple[Layer | None, tuple[str, ...]]]:
    """Everything that holds weights: each layer, then the rest, as module paths."""
    owned = tuple(path for layer in anatomy.layers for path in layer.modules)
    rest = [
        name
        for name, module in denoiser.named_modules()
        if name
        and (module._parameters or module._buffers)
        and not any(name == path or name.startswith(f"{path}.") for path in owned)
    ]
    return [*((layer, layer.modules) for layer in anatomy.layers), (None, tuple(rest))]


def assemble(
    denoisers: Sequence[nn.Module], anatomy: Anatomy, plan: Plan, *, tied: bool
) -> list[nn.Module]:
    """Build N smaller experts that are the same object wherever the plan shares a layer.

    Args:
        denoisers: N base denoisers, one per interval; equal objects where nothing was tuned.
        anatomy: of the base denoiser.
        plan: with N intervals.
        tied: also share copies that start equal (same source, same units), until `untie`.

    Returns:
        N modules; the given denoisers are left alone.
    """
    plan.check(anatomy)
    experts: list[nn.Module] = []
    parts = parts_of(denoisers[0], anatomy)
    for index, source in enumerate(denoisers):
        shared: dict[int, nn.Module] = {}
        own: list[Layer] = []
        for layer, paths in parts:
            owner = _owner(denoisers, anatomy, plan, layer, index, tied)
            if owner is not None:
                for path in paths:
                    # deepcopy looks an object up here before it copies it.
                    shared[id(source.get_submodule(path))] = experts[owner].get_submodule(path)
            elif layer is not None:
                own.append(layer)
        expert = copy.deepcopy(source, shared)
        for layer in own:
            cut_layer(expert, layer, plan.blueprints[index])
        experts.append(expert)
    return experts


def _owner(
    denoisers: Sequence[nn.Module],
    anatomy: Anatomy,
    plan: Plan,
    layer: Layer | None,
    index: int,
    tied: bool,
) -> int | None:
    """The earlier expert whose copy of a layer expert `index` uses, if there is one."""
    numbers = plan.copy_numbers(layer.name if layer else REST)

    def content(expert: int) -> tuple[object, ...]:
        return plan.blueprints[expert].layer(anatomy, layer.name) if layer else ()

    for earlier in range(index):
        same = denoisers[earlier] is denoisers[index] and content(earlier) == content(index)
        if numbers[earlier] == numbers[index] or (tied and same):
            return earlier
    return None


def untie(experts: Sequence[nn.Module], anatomy: Anatomy, plan: Plan) -> None:
    """Give every copy of the plan weights of its own, in place; shared copies stay shared."""
    for layer, paths in parts_of(experts[0], anatomy):
        numbers = plan.copy_numbers(layer.name if layer else REST)
        taken = {id(experts[0].get_submodule(path)) for path in paths}
        for path in paths:
            copies: dict[int, nn.Module] = {numbers[0]: experts[0].get_submodule(path)}
            for number, expert in zip(numbers[1:], experts[1:], strict=True):
                module = expert.get_submodule(path)
                if number not in copies:
                    copies[number] = copy.deepcopy(module) if id(module) in taken else module
                    taken.add(id(copies[number]))
                expert.set_submodule(path, copies[number])
