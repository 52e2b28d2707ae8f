"""The anatomy of diffusers' `UNet2DModel`: ADM and LDM style U-Nets without cross-attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from moediff.anatomy import Anatomy, Branch, BypassKind, Layer, Slice, Width
from moediff.errors import AnatomyError

BLOCKS = {
    "AttnDownBlock2D",
    "AttnUpBlock2D",
    "DownBlock2D",
    "ResnetDownsampleBlock2D",
    "ResnetUpsampleBlock2D",
    "UNetMidBlock2D",
    "UpBlock2D",
}


@attrs.frozen
class UNet2D:
    """Describe a `UNet2DModel`: one layer per ResBlock, with the attention that follows it.

    A ResBlock's units are the groups of its second GroupNorm, an attention's are its heads.
    """

    def supports(self, denoiser: nn.Module) -> bool:
        return isinstance(denoiser, UNet2DModel)

    def dissect(self, denoiser: nn.Module) -> Anatomy:
        return Anatomy(tuple(_layers(denoiser)))


def _layers(denoiser: Any) -> Iterator[Layer]:
    depth = len(denoiser.down_blocks)
    channels = denoiser.config.block_out_channels[0]  # of the feature map that is passed on
    for stage, block in enumerate(denoiser.down_blocks):
        yield from _block(block, f"down_blocks.{stage}", stage, "down", channels)
        channels = denoiser.config.block_out_channels[stage]
    if denoiser.mid_block is not None:
        yield from _block(denoiser.mid_block, "mid_block", depth - 1, "mid", channels)
    for index, block in enumerate(denoiser.up_blocks):
        stage = depth - 1 - index
        yield from _block(block, f"up_blocks.{index}", stage, "up", channels)
        channels = denoiser.config.block_out_channels[stage]


def _block(block: Any, path: str, stage: int, branch: Branch, channels: int) -> Iterator[Layer]:
    if type(block).__name__ not in BLOCKS:
        raise AnatomyError(
            f"{path}: no rule for a {type(block).__name__}; allowed are "
            f"{', '.join(sorted(BLOCKS))}."
        )
    attentions = list(getattr(block, "attentions", None) or [])
    for index, resnet in enumerate(block.resnets):
        attention = attentions[index] if index < len(attentions) else None
        yield _layer(
            (f"{path}.resnets.{index}", resnet),
            (f"{path}.attentions.{index}", attention) if attention is not None else None,
            stage,
            branch,
            channels,
        )
        channels = resnet.conv2.out_channels
    for kind in ("downsamplers", "upsamplers"):
        for index, sampler in enumerate(getattr(block, kind, None) or []):
            if isinstance(sampler, ResnetBlock2D):
                name = f"{path}.{kind}.{index}"
                groups = _groups(name, sampler)
                yield Layer(
                    name,
                    stage,
                    branch,
                    sampler.conv2.out_channels,
                    (name,),
                    (groups,),
                    droppable=False,
                )


def _layer(
    resnet: tuple[str, Any],
    attention: tuple[str, Any] | None,
    stage: int,
    branch: Branch,
    previous: int,
) -> Layer:
    """One layer; `previous` counts the channels that reach it, the skip left out."""
    path, block = resnet
    out = block.conv2.out_channels
    if block.in_channels == out:
        kind: BypassKind = "identity"
    elif branch == "up" and previous == out:
        kind = "previous"
    else:
        kind = "shortcut"
    widths = [_groups(path, block)]
    if attention is not None:
        widths.append(_heads(*attention))
    return Layer(
        name=path,
        stage=stage,
        branch=branch,
        channels=out,
        modules=(path,) if attention is None else (path, attention[0]),
        widths=tuple(widths),
        bypass=kind,
        shortcut=f"{path}.conv_shortcut" if kind == "shortcut" else None,
    )


def _groups(path: str, block: Any) -> Width:
    if type(block) is not ResnetBlock2D:
        raise AnatomyError(
            f"{path}: no rule for a {type(block).__name__}; allowed is ResnetBlock2D."
        )
    slices = [
        Slice(f"{path}.conv1", "out"),
        Slice(f"{path}.norm2", "out"),
        Slice(f"{path}.conv2", "in"),
    ]
    if block.time_emb_proj is not None:
        scale_shift = block.time_embedding_norm == "scale_shift"
        slices.insert(1, Slice(f"{path}.time_emb_proj", "out", blocks=2 if scale_shift else 1))
    count = block.norm2.num_groups
    return Width(
        name=f"{path}.groups",
        kind="groups",
        count=count,
        size=block.norm2.num_channels // count,
        consumer=f"{path}.conv2",
        axis=1,
        slices=tuple(slices),
    )


def _heads(path: str, attention: Any) -> Width:
    if type(attention) is not Attention:
        raise AnatomyError(
            f"{path}: no rule for a {type(attention).__name__}; allowed is Attention."
        )
    return Width(
        name=f"{path}.heads",
        kind="heads",
        count=attention.heads,
        size=attention.inner_dim // attention.heads,
        consumer=f"{path}.to_out.0",
        axis=-1,
        slices=(
            *(Slice(f"{path}.{name}", "out") for name in ("to_q", "to_k", "to_v")),
            Slice(f"{path}.to_out.0", "in"),
        ),
        core=(path,),
        attributes=((path, "heads", 1),),
    )
