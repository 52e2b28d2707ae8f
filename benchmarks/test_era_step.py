"""What a training step of the ERA costs, against one of plain fine-tuning over the same experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
import torch

import moediff
from benchmarks.pairs import paired_ratio
from moediff import Budget, Intervals, Run, Sampling, Subject
from moediff.denoising import denoising_loss
from moediff_plugins.counters.macs import MACs
from moediff_plugins.digits import NULL_LABEL, load_base, load_images
from moediff_plugins.gates.era import ERA, _agent
from moediff_plugins.gates.soft import allowance_of, descent, frozen
from moediff_plugins.pruners.structural import Structural
from moediff_plugins.scorers.magnitude import Magnitude

BATCH = 32
TASK = moediff.Task.from_arrays(*load_images("train"), null_label=NULL_LABEL)


def stepping(parameters: Sequence[torch.nn.Parameter], descend: Callable[[], Any]) -> Any:
    """An optimiser step after a backward pass, the same for both."""
    optimiser = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        descend()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def finetuning(experts: Sequence[Subject]) -> Callable[[], None]:
    """Adds up the gradients of the denoising loss of all experts, every weight being trained."""
    models = [copy.deepcopy(expert.denoiser).train() for expert in experts]
    generator = torch.Generator().manual_seed(0)

    def descend() -> None:
        for model, expert in zip(models, experts, strict=True):
            batch = TASK.batch(BATCH, generator, expert.device)
            timesteps = expert.timesteps(BATCH, generator)
            loss = denoising_loss(model, expert.scheduler, batch, timesteps, generator)
            (loss / len(experts)).backward()  # type: ignore[no-untyped-call]

    step: Callable[[], None] = stepping([p for m in models for p in m.parameters()], descend)
    return step


def routing(experts: Sequence[Subject], intervals: Intervals) -> Callable[[], None]:
    """A step of the agent, as `ERA` makes it."""
    run = Run(sampling=Sampling("ddim", 20))
    scores = Magnitude().score(experts[0], TASK, run)
    spaces = [Structural().space(expert, scores) for expert in experts]
    allowance = allowance_of(experts, spaces, intervals, Budget(0.5, MACs()), run)
    agent, gate = _agent(spaces, 256, run), ERA(steps=1, batch=BATCH)
    descend = descent(gate, agent, experts, spaces, allowance, TASK, torch.zeros(2, 1))
    generator = torch.Generator().manual_seed(0)
    step: Callable[[], None] = stepping(list(agent.parameters()), lambda: descend(0, generator))
    return step


@pytest.mark.parametrize("count", [2, 4])
def test_an_era_step_costs_at_most_1_3_of_a_finetuning_step(benchmark: Any, count: int) -> None:
    subject = moediff.installed().dissect(*load_base())
    intervals = Intervals.uniform(1000, count)
    experts = [
        attrs.evolve(expert, denoiser=copy.deepcopy(expert.denoiser).eval())
        for expert in subject.split(intervals)
    ]
    plain = finetuning(experts)
    with frozen(experts):
        agent = routing(experts, intervals)
        median, low, high = paired_ratio(agent, plain, pairs=15, least=7, spread=0.1)
        benchmark.pedantic(agent, rounds=3)
    benchmark.extra_info.update(ratio=median, quartiles=(low, high))
    print(f"{count} experts: ERA / fine-tuning {median:.2f} (quartiles {low:.2f} to {high:.2f})")
    assert median <= 1.3
