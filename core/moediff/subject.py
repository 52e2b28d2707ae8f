"""The model that strategies work on, and the promise to leave it as it was found."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
import torch
from torch import nn

from moediff.anatomy import Anatomy
from moediff.timesteps import Intervals


@attrs.frozen(eq=False)
class Subject:
    """A denoiser with its scheduler and anatomy, answering for one interval of timesteps.

    The base model answers for all of [0, T). An expert is the same value with a shorter
    interval and, once a tuner has trained it, a denoiser of its own.
    """

    denoiser: nn.Module
    scheduler: Any
    anatomy: Anatomy
    interval: tuple[int, int]

    @property
    def total(self) -> int:
        """T, the number of training timesteps."""
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the samples that the denoiser takes."""
        config: Any = self.denoiser.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(config.in_channels), int(height), int(width)

    def split(self, intervals: Intervals) -> tuple[Subject, ...]:
        """One expert per interval, all of them this same denoiser."""
        return tuple(attrs.evolve(self, interval=interval) for interval in intervals)

    def timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `count` training timesteps (count,) of this subject's interval."""
        return torch.randint(*self.interval, (count,), generator=generator).to(self.device)


def apart(experts: Sequence[Subject]) -> bool:
    """Whether a tuner has given experts denoisers of their own."""
    return len({id(expert.denoiser) for expert in experts}) > 1


def takes_labels(denoiser: nn.Module) -> bool:
    """Whether a denoiser is called with `class_labels`."""
    return getattr(denoiser, "class_embedding", None) is not None


@contextmanager
def preserved(denoiser: nn.Module) -> Iterator[nn.Module]:
    """Run strategies on a denoiser in eval mode, then restore modes, flags and global randomness.

    Weights are the strategies' own promise (the conformance kit checks it); everything that a
    library call may move behind their back is put back here, also after an error.
    """
    modes = {name: module.training for name, module in denoiser.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()}
    grads = {name: parameter.grad for name, parameter in denoiser.named_parameters()}
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    # Where nothing runs on a GPU, asking for its state would set up every one of them.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    denoiser.eval()
    frozen = not any(flags.values())
    for parameter in denoiser.parameters():
        parameter.grad = None  # set aside, or a backward pass would add to it in place
        if frozen:  # as pipelines hand it over; strategies need gradients
            parameter.requires_grad_(True)
    try:
        yield denoiser
    finally:
        for name, module in denoiser.named_modules():
            module.training = modes.get(name, module.training)
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))
            parameter.grad = grads.get(name)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def gradients(parameters: Iterable[nn.Parameter], wanted: bool) -> Iterator[None]:
    """Let gradients flow to all of some parameters, or to none; flags as they were afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in parameters}
    try:
        for parameter in flags:
            parameter.requires_grad_(wanted)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
