"""What the counters of a forward pass share: a twin to run, its inputs, and shares of widths."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moediff.anatomy import Anatomy
from moediff.errors import CountError, OptionError
from moediff.subject import takes_labels


def twin(denoiser: nn.Module, device: str) -> nn.Module:
    """Copy a denoiser in eval mode, its weights as float32 placeholders on `device`.

    On "meta" nothing is allocated. Tensors that are there already are used as they are, so the
    twin must not be trained. Hooks that are put on it are gone when it is.
    """
    memo: dict[int, Any] = {}
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        value = tensor.detach()
        if value.device.type != device or value.dtype != dtype:
            value = torch.zeros(tensor.shape, dtype=dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        # deepcopy looks an object up here before it copies it.
        memo[id(tensor)] = value
    return copy.deepcopy(denoiser, memo).eval()


def example(
    denoiser: nn.Module, shape: Sequence[int] | None, device: str
) -> dict[str, torch.Tensor]:
    """Zeros to call a denoiser with at batch 1, by argument name.

    Args:
        denoiser: a `UNet2DModel`, a `UNet2DConditionModel`, or a module that is called alike.
        shape: (C, H, W) of the sample; None is the config's.
        device: where the zeros are.

    Returns:
        `sample` (1, C, H, W) and `timestep` (1,); `class_labels` (1,) if the model has a class
        embedding; `encoder_hidden_states` (1, 1, D), one token, if it takes cross-attention.

    Raises:
        OptionError: `shape` is none, or is needed because the config has no `sample_size`.
        CountError: the model takes an input that is none of these.
    """
    config = dict(getattr(denoiser, "config", {}))
    inputs = {
        "sample": torch.zeros(1, *_shape(config, shape), device=device),
        "timestep": torch.zeros(1, dtype=torch.long, device=device),
    }
    kind = config.get("class_embed_type")
    _refuse("class_embed_type", kind, (None, "timestep"))
    _refuse("addition_embed_type", config.get("addition_embed_type"), (None,))
    if takes_labels(denoiser):
        inputs["class_labels"] = torch.zeros(1, dtype=torch.long, device=device)
    width = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
    if width is not None:
        if not isinstance(width, int):
            raise CountError(
                f"cross_attention_dim: got {width}; allowed is one integer, because one token is "
                "shown to all blocks."
            )
        inputs["encoder_hidden_states"] = torch.zeros(1, 1, width, device=device)
    return inputs


def _shape(config: Mapping[str, Any], shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is None:
        size, channels = config.get("sample_size"), config.get("in_channels")
        if size is None or channels is None:
            raise OptionError(
                "shape: the denoiser's config has no sample_size and in_channels to take it from. "
                "Pass shape=(C, H, W)."
            )
        shape = (channels, size, size) if isinstance(size, int) else (channels, *size)
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise OptionError(f"shape: got {tuple(shape)}; allowed is (C, H, W), each at least 1.")
    return tuple(shape)


def _refuse(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise CountError(
            f"{name}: got {value!r}; the inputs of such a model are not known, allowed are "
            f"{', '.join(map(str, allowed))}. Count it in a wrapper module that makes them."
        )


def shares(anatomy: Anatomy, own: Mapping[str, float]) -> dict[str, float]:
    """The part of the cost that is proportional to each width's units, by width name.

    Args:
        anatomy: with the widths.
        own: module path -> cost of its own operators, children not included.
    """
    return {
        name: sum(own.get(p, 0.0) for p in {*(s.module for s in width.slices), *width.core})
        for name, width in anatomy.widths.items()
    }
