"""Close units by masks, with hooks on the consumers' inputs; no forward is rewritten.

Masking where the channels are consumed makes a closed unit equal to a removed one. The papers
multiply before the second normalisation, which leaks the silu of a closed channel's bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from moediff.anatomy import Anatomy, Layer, Width
from moediff.errors import PlanError
from moediff.surgery import Bypass


def _spread(mask: torch.Tensor, like: torch.Tensor, axis: int) -> torch.Tensor:
    """Shape a mask (C,) or (B, C) so that it multiplies `like` along `axis`."""
    shape = [1] * like.ndim
    shape[axis] = mask.shape[-1]
    if mask.ndim == 2:
        shape[0] = mask.shape[0]
    shaped: torch.Tensor = mask.to(device=like.device, dtype=like.dtype).view(shape)
    return shaped


def _width_hook(width: Width, mask: torch.Tensor) -> Callable[[nn.Module, Any], Any]:
    # One value per channel is as good as one per unit, and finer where a scorer asks for it.
    channels = mask if mask.shape[-1] == width.count * width.size else None
    if channels is None:
        channels = mask.repeat_interleave(width.size, dim=-1)

    def hook(module: nn.Module, args: Any) -> Any:
        return (args[0] * _spread(channels, args[0], width.axis), *args[1:])

    return hook


def _gate_layer(denoiser: nn.Module, layer: Layer, mask: torch.Tensor, stack: ExitStack) -> None:
    """Y = u f(x) + (1 - u) bypass(x), over the whole layer (DiffPruning Eq. 10-11)."""
    bypass = Bypass.of(denoiser, layer)
    entered: list[torch.Tensor] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered[:] = [args[0]]

    def leave(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        gate = _spread(mask.unsqueeze(-1), output, axis=1)
        blended: torch.Tensor = gate * output + (1 - gate) * bypass(entered.pop())
        return blended

    first, last = layer.modules[0], layer.modules[-1]
    stack.callback(denoiser.get_submodule(first).register_forward_pre_hook(enter).remove)
    stack.callback(denoiser.get_submodule(last).register_forward_hook(leave).remove)


@contextmanager
def masked(denoiser: nn.Module, anatomy: Anatomy, masks: torch.Tensor) -> Iterator[nn.Module]:
    """Run a denoiser with its units masked; the hooks are gone afterwards, also after an error.

    Args:
        denoiser: the model that `anatomy` describes.
        anatomy: with U units.
        masks: (U,), or (B, U) to mask every row of the batch in its own way. Values may lie
            between 0 and 1, and gradients flow to them.

    Raises:
        PlanError: the last axis is not U long.
    """
    if masks.ndim not in (1, 2) or masks.shape[-1] != len(anatomy.units):
        raise PlanError(
            f"masks: got shape {tuple(masks.shape)}; allowed is ({len(anatomy.units)},) or "
            f"(B, {len(anatomy.units)})."
        )
    with ExitStack() as stack:
        for layer in anatomy.layers:
            for width in layer.widths:
                part = masks[..., anatomy.spans[width.name]]
                if part.requires_grad or not bool((part == 1).all()):
                    consumer = denoiser.get_submodule(width.consumer)
                    handle = consumer.register_forward_pre_hook(_width_hook(width, part))
                    stack.callback(handle.remove)
            if layer.droppable:
                gate = masks[..., anatomy.layer_units[layer.name]]
                if gate.requires_grad or not bool((gate == 1).all()):
                    _gate_layer(denoiser, layer, gate, stack)
        yield denoiser


@contextmanager
def masked_channels(denoiser: nn.Module, width: Width, masks: torch.Tensor) -> Iterator[nn.Module]:
    """Mask single channels of one width, masks (C,) or (B, C) with C = count x size.

    Finer than a unit and therefore inexact: a removed channel would also change its group's
    statistics, a masked one does not.
    """
    consumer = denoiser.get_submodule(width.consumer)
    handle = consumer.register_forward_pre_hook(_width_hook(width, masks))
    try:
        yield denoiser
    finally:
        handle.remove()
