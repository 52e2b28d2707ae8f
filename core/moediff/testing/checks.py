"""Every role's check by hook name, and the one that chooses among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moediff.errors import UnknownNameError, did_you_mean
from moediff.roles import (
    AnatomyProvider,
    BudgetCounter,
    Clusterer,
    ExpertTuner,
    Gate,
    Metric,
    MixtureTuner,
    Pruner,
    Report,
    Scorer,
)
from moediff.testing import tiny
from moediff.testing.anatomies import check_anatomy
from moediff.testing.building import check_counter, check_pruner
from moediff.testing.planning import check_clusterer, check_gate, check_scorer
from moediff.testing.promises import (
    check_value,
)
from moediff.testing.reporting import check_report
from moediff.testing.training import check_expert_tuner, check_metric, check_mixture_tuner

CHECKS: dict[str, tuple[tuple[type, Callable[..., None]], ...]] = {
    "scorers": ((Scorer, check_scorer),),
    "clusterers": ((Clusterer, check_clusterer),),
    "gates": ((Gate, check_gate),),
    "pruners": ((Pruner, check_pruner),),
    "counters": ((BudgetCounter, check_counter),),
    "tuners": ((ExpertTuner, check_expert_tuner), (MixtureTuner, check_mixture_tuner)),
    "metrics": ((Metric, check_metric),),
    "anatomies": ((AnatomyProvider, check_anatomy),),
    "reports": ((Report, check_report),),
}
"""Hook name -> the protocols of its role, each with its check."""


def check_strategy(hook: str, strategy: Any, **options: Any) -> None:
    """Run every check that a strategy of a hook has to pass.

    Args:
        hook: "scorers", "clusterers" and so on, as in a plugin's hooks.
        strategy: an instance; for costly ones, with options that make it quick.
        options: passed on to the check, for example `repeatable=False` for a metric, or
            `denoiser=...` for an anatomy; by default anatomies get a tiny `UNet2DModel`.

    Raises:
        UnknownNameError: no such hook.
        ConformanceError: a promise is broken.
    """
    if hook not in CHECKS:
        raise UnknownNameError(f"hook: got {hook!r}.{did_you_mean(hook, CHECKS)}")
    check_value(strategy, tuple(protocol for protocol, _ in CHECKS[hook]))
    if hook == "anatomies":
        options = {"denoiser": tiny.tiny_unet("conditional"), **options}
    for protocol, check in CHECKS[hook]:
        if isinstance(strategy, protocol):
            check(strategy, **options)
