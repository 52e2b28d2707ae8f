"""The interfaces: five roles, and the helper roles that the papers need. Protocols, no base class.

A strategy is a frozen attrs class of hyper-parameters with one pure verb. It may declare two sets
of words: what it `needs` from the other strategies of a recipe and what it `provides` to them
("widths", "layers", "prices"); the budget provides its `of`. A recipe that lacks something is
refused when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs
from torch import nn

from moediff.anatomy import Anatomy
from moediff.cost import Budget, Cost, CostModel
from moediff.plan import Plan
from moediff.space import Scores, SearchSpace
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals

if TYPE_CHECKING:
    from moediff.mixture import ExpertMixture
    from moediff.workdir import Run

Rank = Callable[[Subject], SearchSpace]
"""Scores an expert and orders what may be removed from it; the engine stores the result."""


@runtime_checkable
class Scorer(Protocol):
    """Says what an expert needs."""

    def score(self, expert: Subject, task: Task, run: Run) -> Scores:
        """Return one finite float per unit (U,), larger = keep."""


@runtime_checkable
class Clusterer(Protocol):
    """Splits the timesteps."""

    def cluster(self, subject: Subject, task: Task, run: Run) -> Intervals:
        """Return `run.experts` intervals that cover [0, T)."""


@runtime_checkable
class Pruner(Protocol):
    """Says what may be removed, and removes it."""

    def space(self, expert: Subject, scores: Scores) -> SearchSpace:
        """Return what may be removed from an expert, in which order."""

    def prune(self, experts: Sequence[Subject], plan: Plan) -> ExpertMixture:
        """Return really smaller experts, copies that start equal still tied."""


@runtime_checkable
class Gate(Protocol):
    """Spends the budget: which expert keeps what, and which layers they share."""

    def allocate(
        self,
        experts: Sequence[Subject],
        spaces: Sequence[SearchSpace],
        intervals: Intervals,
        budget: Budget,
        task: Task,
        run: Run,
    ) -> Plan:
        """Return a plan that fits the budget.

        Raises:
            BudgetError: the budget is under the floor that the spaces can reach.
        """


@runtime_checkable
class BudgetCounter(Protocol):
    """Measures what a denoiser costs and what each of its units costs."""

    def count(self, denoiser: nn.Module, shape: Sequence[int] | None = None) -> Cost:
        """Cost of one call at batch 1 on samples of `shape` (C, H, W), the config's by default."""

    def price(self, subject: Subject) -> CostModel:
        """Return prices whose sum is the count of any sub-network."""


@runtime_checkable
class ExpertTuner(Protocol):
    """Prepares experts for being pruned (a recipe's `prepare`)."""

    def prepare(
        self, experts: Sequence[Subject], rank: Rank, intervals: Intervals, task: Task, run: Run
    ) -> Sequence[Subject]:
        """Return N experts with denoisers of their own; the given ones stay as they are."""


@runtime_checkable
class MixtureTuner(Protocol):
    """Recovers a pruned mixture (a recipe's `recover`)."""

    def recover(
        self, mixture: ExpertMixture, task: Task, teacher: Subject, run: Run
    ) -> ExpertMixture:
        """Train the mixture, which is the engine's own copy, and return it."""


@attrs.frozen
class Measurement:
    """One figure: its name, value and unit, from how many samples, and how far it spread."""

    name: str
    value: float
    unit: str
    samples: int
    spread: float | None = None


@runtime_checkable
class Metric(Protocol):
    """Measures a denoiser or a mixture beside the base model."""

    def measure(self, denoiser: nn.Module, subject: Subject, task: Task, run: Run) -> Measurement:
        """Return one figure."""


@runtime_checkable
class AnatomyProvider(Protocol):
    """Knows the insides of a class of denoisers."""

    def supports(self, denoiser: nn.Module) -> bool:
        """Whether `dissect` can describe this model."""

    def dissect(self, denoiser: nn.Module) -> Anatomy:
        """Return the layers and units.

        Raises:
            AnatomyError: a block of this model has no rule.
        """


@runtime_checkable
class Report(Protocol):
    """Shows what there is to know about a finished run."""

    def write(self, folder: Path) -> Path:
        """Write a report into the folder of a finished run, and return its path.

        Raises:
            WorkdirError: the folder holds no finished run.
        """


ROLES: dict[str, tuple[type[Any], ...]] = {
    "scorers": (Scorer,),
    "clusterers": (Clusterer,),
    "gates": (Gate,),
    "pruners": (Pruner,),
    "counters": (BudgetCounter,),
    "tuners": (ExpertTuner, MixtureTuner),
    "metrics": (Metric,),
    "anatomies": (AnatomyProvider,),
    "reports": (Report,),
}
"""Hook name -> the protocols that a class of that role may fulfil."""
