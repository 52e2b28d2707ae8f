"""The check of an anatomy: places that exist, and mask = cut for every unit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from moediff import masking, surgery
from moediff.anatomy import Anatomy
from moediff.plan import Blueprint
from moediff.roles import (
    AnatomyProvider,
)
from moediff.subject import Subject, takes_labels
from moediff.testing.promises import (
    check_value,
    promise,
    settled,
    untouched,
)


def check_anatomy(
    provider: Any, denoiser: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Unique names, places that exist, and mask = cut for every single unit.

    Args:
        provider: the anatomy strategy.
        denoiser: a small model that it supports, in float32.
        inputs: keyword tensors with 2 rows that the model needs beside samples and timesteps; by
            default what diffusers' UNets need, read from the config.

    Raises:
        ConformanceError: a promise is broken.
    """
    check_value(provider, (AnatomyProvider,))
    promise(provider.supports(denoiser), provider, "supports the model", "that it does not")
    promise(not provider.supports(nn.Identity()), provider, "supports what it knows", "anything")
    with settled():
        subject = Subject(denoiser, None, Anatomy(()), (0, 1))
        with untouched(provider, subject):
            anatomy = provider.dissect(denoiser)
        right = isinstance(anatomy, Anatomy) and len(anatomy.units) > 0
        promise(right, provider, "returns an Anatomy with units", repr(anatomy)[:60])
        _check_names(provider, anatomy)
        _check_places(provider, anatomy, denoiser)
        sample, found = example(denoiser, 2)
        _check_mask_is_cut(provider, anatomy, denoiser, sample, found if inputs is None else inputs)


def _check_names(provider: Any, anatomy: Anatomy) -> None:
    names = {
        "units": [unit.name for unit in anatomy.units],
        "layers": [layer.name for layer in anatomy.layers],
        "widths": [width.name for layer in anatomy.layers for width in layer.widths],
    }
    for what, found in names.items():
        repeats = sorted({name for name in found if found.count(name) > 1})
        promise(not repeats, provider, f"the names of {what} are unique", ", ".join(repeats))
    small = [n for n, w in anatomy.widths.items() if w.count < 1 or w.size < 1]
    promise(not small, provider, "counts and sizes of at least 1", ", ".join(small))


def _check_places(provider: Any, anatomy: Anatomy, denoiser: nn.Module) -> None:
    modules = dict(denoiser.named_modules())
    for layer in anatomy.layers:
        shortcut = (layer.shortcut,) if layer.shortcut else ()
        for path in (*layer.modules, *shortcut):
            promise(path in modules, provider, f"{layer.name}: {path} exists", "no such module")
        for width in layer.widths:
            places = [width.consumer, *width.core, *(path for path, _, _ in width.attributes)]
            for path in (*places, *(place.module for place in width.slices)):
                promise(path in modules, provider, f"{width.name}: {path} exists", "no such module")
            for place in width.slices:
                module: Any = modules[place.module]
                size = module.weight.shape[0 if place.side == "out" else 1]
                text = f"{place.module} has count x size x blocks channels on its {place.side} side"
                wanted = width.count * width.size * place.blocks
                promise(size == wanted, provider, text, f"{wanted} and {size}")


def _check_mask_is_cut(
    provider: Any,
    anatomy: Anatomy,
    denoiser: nn.Module,
    sample: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
) -> None:
    def run(net: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = net(sample, 7, **inputs, return_dict=False)[0]
        return output

    denoiser = stirred(denoiser)
    plain = run(denoiser)
    for name, mask in _masks(anatomy):
        with masking.masked(denoiser, anatomy, mask):
            closed = run(denoiser)
        removed = run(surgery.cut(denoiser, anatomy, Blueprint.from_mask(anatomy, mask)))
        close(provider, f"closing {name} is removing it (mask = cut)", removed, closed)
    close(provider, "no mask stays behind", plain, run(denoiser))


def _masks(anatomy: Anatomy) -> Iterator[tuple[str, torch.Tensor]]:
    """Every unit alone, then three random plans."""
    generator = torch.Generator().manual_seed(0)
    for index, unit in enumerate(anatomy.units):
        mask = torch.ones(len(anatomy.units))
        mask[index] = 0
        if unit.width is None or anatomy.widths[unit.width].count > 1:
            yield unit.name, mask  # of a width of one, none left is the layer's own unit
    for number in range(3):
        mask = (torch.rand(len(anatomy.units), generator=generator) > 0.3).float()
        for span in anatomy.spans.values():
            mask[span.start] = 1
        yield f"random plan {number}", mask


def stirred(denoiser: nn.Module) -> nn.Module:
    """A copy in eval mode without the zeros and ones of initialisation, which hide leaks."""
    copied = copy.deepcopy(denoiser).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return copied


def example(denoiser: Any, batch: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Samples (B, C, H, W) and the keyword tensors that a diffusers UNet's config asks for."""
    config = denoiser.config
    generator = torch.Generator().manual_seed(0)
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    sample = torch.randn(batch, config.in_channels, height, width, generator=generator)
    inputs: dict[str, torch.Tensor] = {}
    if takes_labels(denoiser):
        inputs["class_labels"] = torch.arange(batch) % int(config.num_class_embeds or 1)
    if isinstance(dim := config.get("cross_attention_dim"), int):
        inputs["encoder_hidden_states"] = torch.randn(batch, 3, dim, generator=generator)
    return sample, inputs


def close(strategy: Any, text: str, wanted: torch.Tensor, got: torch.Tensor) -> None:
    """Promise two outputs to agree to 1e-5 of their scale."""
    error = float((wanted - got).abs().max() / wanted.abs().max())
    promise(error <= 1e-5, strategy, text, f"a relative difference of {error:.2g}")
