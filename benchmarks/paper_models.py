"""The papers' denoisers at full size with random weights, and what scripts that time them share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

import moediff
from benchmarks.tables import write_markdown
from moediff import Subject, Task

BEDROOM: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (224, 448, 672, 896),
    "norm_num_groups": 32,
    "layers_per_block": 2,
    "attention_head_dim": 32,
    "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
    "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
}
"""LDM, LSUN-Bedroom (also FFHQ and CelebA-HQ): 274 M parameters, 64x64x3 latents."""

_RESIDUAL: dict[str, Any] = {
    "norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}

CHURCH: dict[str, Any] = _RESIDUAL | {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (192, 384, 384, 768, 768),
    "layers_per_block": 2,
    "attention_head_dim": 24,
    "down_block_types": (*["AttnDownBlock2D"] * 4, "DownBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", *["AttnUpBlock2D"] * 4),
}
"""LDM, LSUN-Church: 295 M parameters, 32x32x4 latents."""

GUIDED_64: dict[str, Any] = _RESIDUAL | {
    "sample_size": 64,
    "out_channels": 6,
    "block_out_channels": (192, 384, 576, 768),
    "layers_per_block": 3,
    "attention_head_dim": 64,
    "num_class_embeds": 1000,
    "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
    "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
}
"""Guided Diffusion, ImageNet 64x64: 296 M parameters, learned variance."""


def random_model(config: dict[str, Any], device: str) -> tuple[Subject, Task]:
    """A model with random weights, and a task of its shape."""
    with torch.device(device):
        model = UNet2DModel(**config).eval()
    subject = moediff.installed().dissect(model, DDPMScheduler())
    labels = config.get("num_class_embeds") and {"class_labels": torch.zeros(4).long()}
    return subject, Task(torch.zeros(4, *subject.shape), labels or {})


def parse_args(summary: str, pairs: int = 0) -> argparse.Namespace:
    """Read the command line; `pairs` is the default number of timed pairs, 0 where none are."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--device", default="cpu")
    if pairs:
        parser.add_argument("--pairs", type=int, default=pairs, help="timed pairs of calls per row")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def write_table(
    name: str,
    title: str,
    about: str,
    lines: Sequence[Mapping[str, str]],
    options: argparse.Namespace,
) -> None:
    """Write a script's table, with its command."""
    made_by = f"python -m benchmarks.{name}"
    made_by += f" --pairs {options.pairs}" if "pairs" in options else ""
    made_by += f" --device {options.device}" if options.device != "cpu" else ""
    path = options.results / f"{name}-{options.device}.md"
    write_markdown(path, title, about, lines, made_by, torch.device(options.device))
