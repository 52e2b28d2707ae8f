"""Fine-tune a share of the parameters at the output end (MoEDM Table 1, "partially fine-tune")."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from attrs.validators import ge, gt, in_, instance_of, le, lt
from torch import nn

from moediff.errors import OptionError
from moediff.mixture import ExpertMixture
from moediff.sampling import predict
from moediff.subject import Subject, preserved
from moediff.task import Task
from moediff.workdir import Run
from moediff_plugins.tuners.training import PRECISIONS, SCHEDULES, trainable
from moediff_plugins.tuners.turns import train_in_turns


@attrs.frozen
class Partial:
    """Untie the mixture and train its last layers with the denoising loss, the experts in turns.

    The paper trains 29 % of the parameters and does not say which. Here whole layers are taken
    from the output end of the network backwards, in the order in which one call of the full model
    runs them, and the first that would exceed the share ends it. A layer is a ResBlock with its
    attention, or else a single module, such as the last convolution. In a mixture all copies of a
    layer go together, and the share is one of all stored parameters, each counted once. What the
    base froze counts and stays frozen. Records: see `turns.train_in_turns`.

    Attributes:
        share: largest share of the parameters to train.
        steps: optimiser steps, summed over the experts.
        batch: B, images per step.
        learning_rate: see `training.Settings` for this field and those that follow.
    """

    share: float = attrs.field(default=0.29, validator=[gt(0), le(1)])
    steps: int = attrs.field(default=1000, validator=[instance_of(int), ge(0)])
    batch: int = attrs.field(default=64, validator=[instance_of(int), ge(1)])
    learning_rate: float = attrs.field(default=1e-4, validator=gt(0))
    weight_decay: float = attrs.field(default=0.0, validator=ge(0))
    schedule: str = attrs.field(default="cosine", validator=in_(SCHEDULES))
    warmup: float = attrs.field(default=0.05, validator=[ge(0), lt(1)])
    clip: float = attrs.field(default=1.0, validator=gt(0))
    ema: float = attrs.field(default=0.999, validator=[ge(0), lt(1)])
    save_every: int = attrs.field(default=500, validator=[instance_of(int), ge(1)])
    precision: str = attrs.field(default="full", validator=in_(PRECISIONS))

    def recover(
        self, mixture: ExpertMixture, task: Task, teacher: Subject, run: Run
    ) -> ExpertMixture:
        mixture.untie()
        parameters = self._last(mixture, _layers(teacher, task))
        run.spend(samples=1)
        train_in_turns(self, "partial", mixture, parameters, task, teacher, run)
        return mixture

    def _last(self, mixture: ExpertMixture, layers: list[tuple[str, ...]]) -> list[nn.Parameter]:
        """The parameters of the last layers that together stay within the share."""
        ours = {id(parameter) for parameter in trainable(mixture)}
        # Names are `experts.<i>.<path>`; a shared parameter comes once.
        named = [(name.split(".", 2)[2], value) for name, value in mixture.named_parameters()]
        total = sum(value.numel() for _, value in named)
        chosen: list[nn.Parameter] = []
        for paths in layers:
            inside = tuple(f"{path}." for path in paths)
            part = [v for name, v in named if name.startswith(inside) and id(v) in ours]
            size = sum(value.numel() for value in (*chosen, *part))
            if size > self.share * total:
                break
            chosen += part
        if not chosen:
            raise OptionError(
                f"share: got {self.share}; the last layer that may be trained, "
                f"{' with '.join(paths)}, is {size / total:.4f} of the parameters. Ask for at "
                "least that much, or use `bitfit`."
            )
        return chosen


def _layers(teacher: Subject, task: Task) -> list[tuple[str, ...]]:
    """The paths of each layer's modules in the full model, those of the layer that ran last first.

    Registration order would not do: diffusers registers the mid block after the up blocks.
    """
    whole = {path: layer.modules for layer in teacher.anatomy.layers for path in layer.modules}
    order: dict[tuple[str, ...], None] = {}
    handles = []

    def note(paths: tuple[str, ...]) -> Any:
        def hook(*_: Any) -> None:
            order.pop(paths, None)
            order[paths] = None

        return hook

    for name, module in teacher.denoiser.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            parts = name.split(".")
            above = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
            layer = next((whole[path] for path in above if path in whole), (name,))
            handles.append(module.register_forward_hook(note(layer)))
    sample = torch.zeros(1, *teacher.shape, device=teacher.device)
    asked, _ = task.prompts(1, teacher.device, training=True)
    try:
        with preserved(teacher.denoiser), torch.no_grad():
            predict(teacher.denoiser, sample, torch.zeros(1, device=teacher.device), asked)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)[::-1]
