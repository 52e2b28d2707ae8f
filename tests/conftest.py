"""Shared fixtures: tiny denoisers that differ wherever an anatomy has to know, and tiny data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

import moediff
from moediff_plugins.counters import latency

UNETS: dict[str, dict[str, Any]] = {
    "plain": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "scale-shift": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "resampling-blocks": {
        "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D"),
        "add_attention": False,
    },
    "class-conditional": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "num_class_embeds": 4,
        "layers_per_block": 1,
    },
    "three-stages": {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "mid_block_scale_factor": 2.0,
    },
}


def tiny_unet(kind: str = "plain", seed: int = 0, **changes: Any) -> UNet2DModel:
    """A UNet of a few thousand parameters on 8x8 images with 3 channels, in eval mode."""
    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        **UNETS[kind],
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet2DModel(**config).eval()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.ndim == 1:  # zeros and ones would hide what a bias leaks
                    parameter += 0.2 * torch.randn(parameter.shape)
    return net


def tiny_task(labelled: bool = False, count: int = 32) -> moediff.Task:
    """Random images: what is tested with them must not depend on what they show."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (count, 8, 8, 3)).astype(np.float32)
    labels = rng.integers(0, 4, count) if labelled else None
    return moediff.Task.from_arrays(images, labels)


def base_scheduler(name: str) -> Any:
    """A scheduler of T = 1000 of a base that the sampling of this name suits."""
    flows = name == "flow-match"
    return FlowMatchEulerDiscreteScheduler() if flows else DDPMScheduler()


def conditioning(unet: UNet2DModel, batch: int) -> dict[str, torch.Tensor]:
    """The keyword tensors that a tiny UNet needs for a batch."""
    if unet.class_embedding is None:
        return {}
    return {"class_labels": torch.arange(batch) % 4}


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables that tests measure go to a folder of their own."""
    folder = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "cached_assets_path", lambda *names: folder.joinpath(*names))
        patch.setenv("HF_ASSETS_CACHE", str(folder))  # of what tests start
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are faster on one thread, and sums come out in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000)


@pytest.fixture(params=sorted(UNETS))
def any_subject(request: pytest.FixtureRequest, scheduler: DDPMScheduler) -> moediff.Subject:
    """Every kind of tiny UNet in turn, dissected."""
    return moediff.installed().dissect(tiny_unet(request.param), scheduler)


@pytest.fixture
def subject(scheduler: DDPMScheduler) -> moediff.Subject:
    return moediff.installed().dissect(tiny_unet(), scheduler)


@pytest.fixture
def task() -> moediff.Task:
    return tiny_task()
