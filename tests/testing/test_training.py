"""The kit catches wrong tuners and metrics: one broken strategy for each promise."""

from __future__ import annotations

import time
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import nn

from moediff import Measurement, NoEffectWarning, Run, Subject, Task
from moediff.testing import check_expert_tuner, check_metric, check_mixture_tuner
from tests.core.toys import Nudge
from tests.testing.catching import call, caught

# Tuners


@attrs.frozen
class Preparing(Nudge):
    """A tuner of experts that can be spoilt."""

    spoil: str = ""

    def prepare(self, experts: Any, rank: Any, intervals: Any, task: Any, run: Any) -> Any:
        match self.spoil:
            case "given":
                return experts
            case "one":
                return Nudge().prepare(experts, rank, intervals, task, run)[:1]
            case "nothing":
                return Nudge(0.0).prepare(experts, rank, intervals, task, run)
            case "broken":
                return Nudge(float("nan")).prepare(experts, rank, intervals, task, run)
            case "in place":
                Nudge()._move(experts[0].denoiser, run.generator("x"))
            case "warned":
                import warnings

                warnings.warn("nothing to do", NoEffectWarning, stacklevel=1)
                return Nudge(0.0).prepare(experts, rank, intervals, task, run)
        return Nudge().prepare(experts, rank, intervals, task, run)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("given", "denoisers of their own|warns"),
        ("one", "one expert per interval"),
        ("nothing", r"warns \(NoEffectWarning\) if nothing changed"),
        ("broken", "finite weights"),
        ("in place", "leaves the weights as found"),
    ],
)
def test_wrong_experts_are_caught(spoil: str, message: str) -> None:
    caught(check_expert_tuner, Preparing(spoil=spoil), message)


@attrs.frozen
class Recovering(Nudge):
    """A tuner of mixtures that can be spoilt."""

    spoil: str = ""

    def recover(self, mixture: Any, task: Any, teacher: Any, run: Any) -> Any:
        match self.spoil:
            case "nothing":
                return mixture
            case "broken":
                return Nudge(float("nan")).recover(mixture, task, teacher, run)
            case "teacher":
                self._move(teacher.denoiser, run.generator("x"))
            case "experts":
                return mixture.experts
            case "random":
                mixture.experts[0].conv_out.bias.data += torch.tensor(np.random.rand())
        return Nudge().recover(mixture, task, teacher, run)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("nothing", r"warns \(NoEffectWarning\) if nothing changed"),
        ("broken", "finite weights"),
        ("teacher", "leaves the weights as found"),
        ("experts", "returns an ExpertMixture"),
        ("random", "leaves NumPy's global random state as found"),
    ],
)
def test_wrong_recoveries_are_caught(spoil: str, message: str) -> None:
    caught(check_mixture_tuner, Recovering(spoil=spoil), message)


def test_good_tuners_pass() -> None:
    check_expert_tuner(Nudge())
    check_expert_tuner(Preparing(spoil="warned"))
    check_mixture_tuner(Nudge())


# Metrics


@attrs.frozen
class Measuring:
    """A metric that can be spoilt."""

    spoil: str = ""

    def measure(self, denoiser: nn.Module, subject: Subject, task: Task, run: Run) -> Any:
        expert = attrs.evolve(subject, denoiser=denoiser)
        with torch.no_grad():
            value = float(call(expert, task).abs().mean())
        match self.spoil:
            case "nan":
                value = float("nan")
            case "hook":
                denoiser.register_forward_hook(lambda *_: None)
            case "nameless":
                return Measurement("", value, "", 2)
            case "number":
                return value
            case "clock":
                value += time.perf_counter()
        return Measurement("mean", value, "", 2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("nan", "a finite value"),
        ("hook", "leaves the hooks as found"),
        ("nameless", "a name, a unit and a number of samples"),
        ("number", "returns a Measurement. Found: float"),
        ("clock", "the same seed gives the same result"),
    ],
)
def test_wrong_figures_are_caught(spoil: str, message: str) -> None:
    caught(check_metric, Measuring(spoil), message)


def test_good_metrics_pass() -> None:
    check_metric(Measuring())
    check_metric(Measuring("clock"), repeatable=False)
