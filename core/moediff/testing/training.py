"""Checks of the helper roles: tuners and metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from moediff.errors import NoEffectWarning
from moediff.mixture import ExpertMixture
from moediff.roles import (
    ExpertTuner,
    Measurement,
    Metric,
    MixtureTuner,
)
from moediff.subject import Subject
from moediff.testing import tiny
from moediff.testing.promises import (
    check_value,
    failing,
    promise,
    repeated,
    settled,
    untouched,
)
from moediff.timesteps import Intervals


def check_expert_tuner(strategy: Any) -> None:
    """N experts of their own, the base's shapes, finite weights; the given ones untouched.

    Raises:
        ConformanceError: a promise is broken.
    """
    check_value(strategy, (ExpertTuner,))
    kind = "conditional"

    def prepare(base: Subject) -> Sequence[Subject]:
        task, intervals = tiny.tiny_task(kind), Intervals(tiny.CUTS)
        with untouched(strategy, base, data=[task]):
            found: Sequence[Subject] = _effective(
                strategy,
                base.denoiser,
                lambda: strategy.prepare(
                    base.split(intervals), tiny.tiny_space, intervals, task, tiny.tiny_run(kind)
                ),
                lambda tuned: [expert.denoiser for expert in tuned],
            )
        return found

    with settled():
        base = tiny.tiny_subject(kind)
        experts = repeated(
            strategy, lambda: prepare(base), lambda found: [e.denoiser for e in found]
        )
        promise(len(experts) == 2, strategy, "one expert per interval", str(len(experts)))
        spans = [expert.interval for expert in experts]
        promise(spans == list(Intervals(tiny.CUTS)), strategy, "keeps the intervals", str(spans))
        for expert in experts:
            own = expert.denoiser is not base.denoiser
            promise(own, strategy, "experts have denoisers of their own", "the given one")
            sizes = [
                {k: v.shape for k, v in s.denoiser.state_dict().items()} for s in (base, expert)
            ]
            promise(sizes[0] == sizes[1], strategy, "experts keep the base's shapes", "others")
            _check_finite(strategy, expert.denoiser)
        failing(strategy, lambda: tiny.tiny_subject(kind), prepare)


def check_mixture_tuner(strategy: Any) -> None:
    """A trained mixture of the same plan; the teacher untouched.

    Raises:
        ConformanceError: a promise is broken.
    """
    check_value(strategy, (MixtureTuner,))
    kind = "conditional"

    def recover(teacher: Subject) -> ExpertMixture:
        task, plan = tiny.tiny_task(kind), tiny.tiny_plan(teacher)
        mixture = ExpertMixture.from_experts(tiny.tiny_subject(kind).split(plan.intervals), plan)
        with untouched(strategy, teacher, data=[task]):
            found: ExpertMixture = _effective(
                strategy,
                mixture,
                lambda: strategy.recover(mixture, task, teacher, tiny.tiny_run(kind)),
                lambda tuned: [_mixture(strategy, tuned)],
            )
        return found

    with settled():
        teacher = tiny.tiny_subject(kind)
        plan = tiny.tiny_plan(teacher)
        mixture = repeated(strategy, lambda: recover(teacher), lambda found: found)
        promise(mixture.plan == plan, strategy, "the mixture keeps its plan", "another one")
        _check_finite(strategy, mixture)
        for layer in teacher.anatomy.layers:
            first, second = (expert.get_submodule(layer.modules[0]) for expert in mixture.experts)
            shared = plan.copy_numbers(layer.name) == (0, 0)
            text = f"{layer.name} stays one object, as the plan shares it"
            promise(not shared or first is second, strategy, text, "two")
        failing(strategy, lambda: tiny.tiny_subject(kind), recover)


def _mixture(strategy: Any, tuned: Any) -> ExpertMixture:
    right = isinstance(tuned, ExpertMixture)
    promise(right, strategy, "returns an ExpertMixture", type(tuned).__name__)
    mixture: ExpertMixture = tuned
    return mixture


def _effective(
    strategy: Any,
    before: nn.Module,
    tune: Callable[[], Any],
    modules: Callable[[Any], Sequence[nn.Module]],
) -> Any:
    """Run a tuner; a run that moves no weight has to warn."""
    old = {name: value.clone() for name, value in before.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned = tune()
    warned = any(issubclass(entry.category, NoEffectWarning) for entry in caught)
    moved = any(
        not torch.equal(old[name], value)
        for module in modules(tuned)
        for name, value in module.state_dict().items()
        if name in old and old[name].shape == value.shape
    )
    promise(moved or warned, strategy, "warns (NoEffectWarning) if nothing changed", "silence")
    return tuned


def _check_finite(strategy: Any, module: nn.Module) -> None:
    wrong = [name for name, value in module.state_dict().items() if not value.isfinite().all()]
    promise(not wrong, strategy, "finite weights", f"NaN or infinite values in {wrong[:3]}")


def check_metric(strategy: Any, repeatable: bool = True) -> None:
    """A finite figure with its name and unit; model, base and data as they were found.

    Args:
        strategy: the metric.
        repeatable: whether two runs must agree. A measured time or memory cannot.

    Raises:
        ConformanceError: a promise is broken.
    """
    check_value(strategy, (Metric,))
    kind = "conditional"

    def measure(base: Subject) -> Measurement:
        task, plan = tiny.tiny_task(kind), tiny.tiny_plan(base)
        mixture = ExpertMixture.from_experts(base.split(plan.intervals), plan)
        other = attrs.evolve(base, denoiser=mixture)
        with untouched(strategy, base, other, data=[task]):
            found: Measurement = strategy.measure(mixture, base, task, tiny.tiny_run(kind))
        return found

    with settled():
        figure = repeated(
            strategy,
            lambda: measure(tiny.tiny_subject(kind)),
            lambda found: found if repeatable else None,
        )
        right = isinstance(figure, Measurement)
        promise(right, strategy, "returns a Measurement", type(figure).__name__)
        promise(math.isfinite(figure.value), strategy, "a finite value", str(figure.value))
        named = bool(figure.name) and isinstance(figure.unit, str) and figure.samples >= 0
        promise(named, strategy, "a name, a unit and a number of samples", repr(figure))
        failing(strategy, lambda: tiny.tiny_subject(kind), measure)
