"""Torch-Pruning, the tool that a user would reach for, on the same base, budget and steps.

Channels are removed by its Taylor importance, as in the example of its authors for diffusion
models (Fang et al., 2023). What it does differently: one model for all timesteps; channels go
everywhere, on residual paths too, where they are tied through all that is added or joined to them;
a GroupNorm keeps its number of groups, each loses as many channels, and what remains is normalised
by other statistics; an attention keeps its heads and each gets narrower; no layer is dropped.

The authors' example spares the last convolution alone, and trains for 100,000 steps. After a few
hundred, the loss at the first timesteps of sampling is still several times the base's, and a
sampler multiplies errors there (by 13 at t = 950 of the digits' schedule), so that images fall
apart. `keep_path` also spares the first stage's residual path and the time embedding, by the
tool's own option; it was chosen after seeing what became of the images without it.

    pip install torch-pruning
    python -m benchmarks.budgets --on digits
"""

from __future__ import annotations

import copy
import time
from importlib.metadata import version
from typing import Any

import torch
import torch_pruning as tp
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

import moediff
from benchmarks.recipes import finetune
from benchmarks.rows import Row, Trained, measure
from benchmarks.settings import Setting
from moediff import ExpertMixture, Run, Subject, Task
from moediff.denoising import denoising_loss
from moediff.errors import BudgetError
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.params import Params

SAMPLES, BATCH = 256, 64  # of the Taylor importance; `taylor` has the same
STEP, HALVINGS = 0.15, 5  # the search for the ratio that meets the budget


def prune_with_torch_pruning(
    subject: Subject, task: Task, share: float, seed: int, *, keep_path: bool = False
) -> nn.Module:
    """Return a smaller copy of the denoiser with at most `share` of its MACs, as near as can be.

    Torch-Pruning takes a ratio of channels and not a budget, so the ratio is searched: in steps
    until the budget is met, then by halving the last step. (MACs do not fall all the way with the
    ratio: a group that would lose all its channels is passed over.)

    Args:
        subject: a diffusers `UNet2DModel`; it is left as it is.
        task: whose denoising loss the importance is of.
        share: MACs of one call, as a share of the base's.
        seed: of the samples that the importance is measured on.
        keep_path: prune no channel of the first stage's residual path, nor the time embedding.

    Raises:
        BudgetError: no ratio reaches the share.
    """
    counter = MACs()
    full = counter.count(subject.denoiser).value
    slopes = _slopes(subject, task, seed)

    def attempt(ratio: float) -> tuple[float, nn.Module]:
        denoiser = _pruned(subject, slopes, ratio, keep_path)
        return counter.count(denoiser).value / full, denoiser

    low, high, reached = 0.0, 0.0, 1.0
    while reached > share:
        low, high = high, high + STEP
        if high >= 1:
            raise BudgetError(f"share: got {share:.4g}; torch-pruning does not get there.")
        reached, best = attempt(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found, denoiser = attempt(middle)
        if found > share:
            low = middle
        else:
            high = middle
            if found > reached:
                reached, best = found, denoiser
    return best


def _slopes(subject: Subject, task: Task, seed: int) -> list[torch.Tensor]:
    """The gradient of the mean denoising loss over all timesteps on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    denoiser = copy.deepcopy(subject.denoiser).eval().requires_grad_(True)
    for _ in range(SAMPLES // BATCH):
        batch = task.batch(BATCH, generator, subject.device)
        timesteps = torch.randint(subject.total, (BATCH,), generator=generator).to(subject.device)
        loss = denoising_loss(denoiser, subject.scheduler, batch, timesteps, generator)
        (loss * BATCH / SAMPLES).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in denoiser.parameters()]


def _first_path(denoiser: Any) -> list[nn.Module]:
    """What writes to the residual path at full resolution, and what every timestep goes through.

    Torch-Pruning passes over all that is tied to one of these, shortcuts and attentions too.
    """
    blocks = (denoiser.down_blocks[0], denoiser.up_blocks[-1])
    convolutions = [resnet.conv2 for block in blocks for resnet in block.resnets]
    return [denoiser.conv_in, denoiser.time_embedding, *convolutions]


def _pruned(
    subject: Subject, slopes: list[torch.Tensor], ratio: float, keep_path: bool
) -> nn.Module:
    """A copy without the least important channels, a share `ratio` of all that are prunable."""
    denoiser: Any = copy.deepcopy(subject.denoiser).eval().requires_grad_(True)
    for parameter, slope in zip(denoiser.parameters(), slopes, strict=True):
        parameter.grad = slope.clone()
    sample = torch.zeros(1, *subject.shape, device=subject.device)
    inputs = {"sample": sample, "timestep": torch.ones(1, device=subject.device).long()}
    if denoiser.class_embedding is not None:
        inputs["class_labels"] = torch.zeros(1, device=subject.device).long()
    attentions = [module for module in denoiser.modules() if isinstance(module, Attention)]
    heads = {m: a.heads for a in attentions for m in (a.to_q, a.to_k, a.to_v)}
    pruner = tp.pruner.BasePruner(
        denoiser,
        inputs,
        importance=tp.importance.GroupTaylorImportance(),
        # By layer, as in the authors' example, any ratio takes one channel of every pair in a
        # GroupNorm of pairs: the digits' model goes to 43 % of its MACs at once.
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[denoiser.conv_out, *(_first_path(denoiser) if keep_path else ())],
        in_channel_groups={},  # the default is one dictionary for all calls
        out_channel_groups={},
        num_heads=heads,
    )
    pruner.step()
    for module in denoiser.modules():  # what diffusers also keeps as numbers
        if isinstance(module, (Downsample2D, Upsample2D)):
            module.channels = module.conv.in_channels
            module.out_channels = module.conv.out_channels
    for attention in attentions:
        attention.inner_dim = attention.to_q.out_features
        attention.inner_kv_dim = attention.to_k.out_features
        attention.query_dim = attention.to_q.in_features
        attention.out_dim = attention.to_out[0].out_features
    denoiser.zero_grad(set_to_none=True)
    return denoiser


def mixture_of(denoiser: nn.Module, on: Setting) -> ExpertMixture:
    """A mixture of one expert, so that every tuner trains it and every metric measures it.

    It cannot be loaded again from a folder: no plan says what Torch-Pruning removed.
    """
    expert = moediff.installed().dissect(denoiser, on.subject.scheduler)
    return ExpertMixture.from_experts([expert], on.whole)


def pruned_row(on: Setting, share: float, *, keep_path: bool = False) -> Row:
    """The row of torch-pruning at a share of the MACs, trained as the other rows are."""

    def make(seed: int) -> dict[str, float]:
        started = time.perf_counter()
        denoiser = prune_with_torch_pruning(on.subject, on.task, share, seed, keep_path=keep_path)
        run = Run(sampling=on.sampling, seed=seed, device=on.subject.device, verbose=True)
        tuner, mixture = finetune(on), mixture_of(denoiser, on)
        tuner.recover(mixture, on.task, on.subject, run).eval()
        images = SAMPLES + tuner.steps * tuner.batch
        seconds = time.perf_counter() - started
        row = Trained(mixture, on.whole, tuner.steps, images, seconds)
        size, macs = (
            counter.count(denoiser).value / counter.count(on.subject.denoiser).value
            for counter in (Params(), MACs())
        )
        return measure(row, on, seed) | {"live": size, "stored": size, "MACs": macs}

    return Row(make, (share, keep_path, finetune(on), version("torch-pruning")))
