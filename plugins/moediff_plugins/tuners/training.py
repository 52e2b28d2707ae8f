"""What the tuners share: one training loop, which a killed run resumes, on a CPU bit-equal.

On a GPU backward passes may add up in another order each time, unless torch is told to be
deterministic (`torch.use_deterministic_algorithms`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from moediff.errors import MoediffError, NoEffectWarning, OptionError
from moediff.storage import Packed, Tensors
from moediff.subject import gradients
from moediff.workdir import Run

SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}
"""Learning-rate schedules, by diffusers' names."""

PRECISIONS = ("full", "bf16")
"""What `autocast` computes a loss in: the weights' own type, or bfloat16 where that is safe."""

Descend = Callable[[int, torch.Generator], torch.Tensor]
"""Adds the gradient of a step's loss to `.grad` and returns the loss (). All randomness comes from
the generator. It calls `backward` itself, because under gradient checkpointing that runs parts of
the forward again, and what held for them (masks) must still hold."""


class Settings(Protocol):
    """The fields that `train` reads from a tuner; the tuners' `precision` is for `autocast`.

    Attributes:
        learning_rate: AdamW's, at its peak (Loshchilov and Hutter, 2019).
        weight_decay: AdamW's.
        schedule: a name from `SCHEDULES`.
        warmup: share of the steps in which the learning rate rises from 0.
        clip: largest norm of the gradient of all parameters together.
        ema: decay of the moving average of the weights, which replaces them at the end; 0 is off.
        save_every: steps between two checkpoints.
    """

    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def ema(self) -> float: ...
    @property
    def save_every(self) -> int: ...


def train(
    settings: Settings,
    name: str,
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    descend: Descend,
    steps: int,
    rows: int,
    run: Run,
) -> None:
    """Train a module in place and leave it in eval mode, its flags as they were, no `.grad`.

    Every step has a generator of its own, so a resumed run needs no generator states. Parameters
    that a step's loss does not reach are skipped by AdamW in that step, weight decay included.

    Args:
        settings: usually the tuner itself.
        name: of the checkpoint, the generators, the progress bar and the record `loss-<name>`.
        module: in train mode meanwhile.
        parameters: those to train; the module's others are frozen meanwhile.
        descend: called once per step.
        steps: optimiser steps.
        rows: samples that one call of `descend` passes through denoisers, for the ledger.
        run: the run.

    Raises:
        MoediffError: the loss or its gradient is not finite; no step was made with it.
    """
    if steps == 0:
        return
    parameters = list(parameters)
    group = {"params": parameters, "initial_lr": settings.learning_rate}
    optimiser = torch.optim.AdamW(
        [group], lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    average = EMAModel(parameters, decay=settings.ema, foreach=True) if settings.ema else None
    checkpoint = run.checkpoint(name)
    losses = _restore(checkpoint.load(), parameters, optimiser, average)
    run.spend(samples=rows * len(losses), steps=len(losses))
    if len(losses) < steps:
        rates = get_scheduler(
            SCHEDULES[settings.schedule],
            optimiser,
            num_warmup_steps=int(settings.warmup * steps),
            num_training_steps=steps,
            last_epoch=len(losses) - 1,
        )
        with _training(module, parameters):
            progress = run.progress(range(len(losses), steps), name)
            for step in progress:
                generator = run.generator(f"{name}-{step}")
                with _seeded(generator, parameters[0].device):
                    value = descend(step, generator)
                norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
                losses.append(value.item())
                if not (math.isfinite(losses[-1]) and math.isfinite(norm.item())):
                    raise MoediffError(
                        f"{name}: the loss is {losses[-1]} and its gradient's norm {norm.item()} "
                        f"at step {step}, learning rate {rates.get_last_lr()[0]:.3g}. Both must be "
                        "finite. Lower the learning rate, warm up longer, or check the images."
                    )
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                rates.step()
                if average is not None:
                    average.step(parameters)
                run.spend(samples=rows, steps=1)
                progress.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                if len(losses) % settings.save_every == 0 and len(losses) < steps:
                    checkpoint.save(*_pack(losses, parameters, optimiser, average))
        if average is not None:
            average.copy_to(parameters)
        checkpoint.save(*_pack(losses, parameters))
    run.record(f"loss-{name}", torch.tensor(losses))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Mixed precision for the forward pass of a loss; weights and optimiser stay as they are.

    With "bf16", convolutions and matrix products run in bfloat16 and losses in float32. It has
    float32's range, so no gradient scaling is needed.

    Raises:
        OptionError: the device cannot compute in bfloat16.
    """
    wanted = precision == "bf16"
    if wanted and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise OptionError(
            f"precision: got {precision!r}, which {torch.cuda.get_device_name(device)} does not "
            'have. Use "full".'
        )
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The distinct parameters that the base left open; what it froze is not ours to train.

    Raises:
        OptionError: it froze all of them.
    """
    found = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not found:
        raise OptionError(
            "denoiser: got one whose parameters are all frozen; training needs some that are not. "
            "Call `denoiser.requires_grad_(True)` before the mixture is built."
        )
    return found


def share(steps: int, count: int, index: int) -> int:
    """How many of `steps` fall to one of `count` experts; the first ones take what is left over."""
    return steps // count + (index < steps % count)


def warn_if_idle(tuner: object, steps: int, wanted: int) -> None:
    """Warn where `steps` are too few for all of `wanted` experts to be trained."""
    if steps < wanted:
        left = "nothing was trained" if steps == 0 else f"experts from {steps} on were not trained"
        warnings.warn(
            f"{type(tuner).__name__}: got {steps} steps for {wanted} expert(s); {left}. "
            "Ask for more steps, or leave the tuner out.",
            NoEffectWarning,
            stacklevel=3,
        )


@contextmanager
def _training(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Train mode with gradients for `parameters` alone; eval mode, old flags, no `.grad` after."""
    everything = list(module.parameters())
    try:
        with gradients(everything, False), gradients(parameters, True):
            module.train()
            yield
    finally:
        module.eval()
        for parameter in everything:
            parameter.grad = None


@contextmanager
def _seeded(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Dropout draws from the global state: seed it for one step, and put it back."""
    seed = int(torch.randint(2**31, (), generator=generator))
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


def _pack(
    losses: Sequence[float],
    parameters: Sequence[nn.Parameter],
    optimiser: torch.optim.Optimizer | None = None,
    average: Any = None,
) -> Packed:
    """Unfinished work; without an optimiser, finished work."""
    tensors: Tensors = {f"parameter.{i}": tensor for i, tensor in enumerate(parameters)}
    for index, state in optimiser.state_dict()["state"].items() if optimiser else ():
        tensors |= {f"optimiser.{index}.{key}": value for key, value in state.items()}
    if average is not None:
        tensors |= {f"average.{i}": tensor for i, tensor in enumerate(average.shadow_params)}
    return tensors, {"losses": list(losses)}


def _restore(
    packed: Packed | None,
    parameters: Sequence[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    average: Any,
) -> list[float]:
    """Put back what `_pack` saved; returns the losses of the steps that were made."""
    if packed is None:
        return []
    tensors, data = packed
    state: dict[int, Tensors] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            part, index, *key = name.split(".")
            if part == "parameter":
                parameters[int(index)].copy_(tensor)
            elif part == "average":
                average.shadow_params[int(index)].copy_(tensor)
            else:
                state.setdefault(int(index), {})[key[0]] = tensor
    if average is not None:
        average.optimization_step = len(data["losses"])
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    losses: list[float] = data["losses"]
    return losses
