"""A recipe: one strategy per role, the budget, the number of experts and the seed."""

from __future__ import annotations

from typing import Any

import attrs

from moediff.cost import Budget
from moediff.errors import IncompatibleError, OptionError
from moediff.registry import Registry, installed
from moediff.roles import (
    BudgetCounter,
    Clusterer,
    ExpertTuner,
    Gate,
    MixtureTuner,
    Pruner,
    Scorer,
)
from moediff.sampling import Sampling

COMPONENTS: dict[str, tuple[str, type[Any]]] = {
    "scorer": ("scorers", Scorer),
    "clusterer": ("clusterers", Clusterer),
    "gate": ("gates", Gate),
    "pruner": ("pruners", Pruner),
    "prepare": ("tuners", ExpertTuner),
    "recover": ("tuners", MixtureTuner),
}
"""Recipe field -> the hook that offers its strategies and the protocol they fulfil."""

INHERENT = frozenset({"intervals"})
"""What every recipe provides. A scorer that needs intervals is asked for each expert by itself."""


@attrs.frozen
class Recipe:
    """One frozen value that says how a mixture is built. Swap a component with `attrs.evolve`.

    Raises:
        OptionError: a component is a class instead of an instance, or fulfils another role.
        IncompatibleError: a strategy needs what no other one provides.
    """

    scorer: Scorer
    clusterer: Clusterer
    gate: Gate
    pruner: Pruner
    budget: Budget
    experts: int = attrs.field(
        default=2, validator=[attrs.validators.instance_of(int), attrs.validators.ge(1)]
    )
    prepare: ExpertTuner | None = None
    recover: MixtureTuner | None = None
    sampling: Sampling = attrs.field(factory=Sampling)
    seed: int = attrs.field(
        default=0, validator=[attrs.validators.instance_of(int), attrs.validators.ge(0)]
    )

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise OptionError(f"budget: got {self.budget!r}; pass a Budget(value, counter).")
        fields: list[tuple[str, Any, type[Any]]] = [
            (field, getattr(self, field), protocol) for field, (_, protocol) in COMPONENTS.items()
        ]
        fields.append(("counter", self.budget.counter, BudgetCounter))
        for field, value, protocol in fields:
            optional = field in ("prepare", "recover")
            if isinstance(value, type):
                raise OptionError(f"{field}: got the class {value.__name__}; pass an instance.")
            if not isinstance(value, protocol) and not (optional and value is None):
                raise OptionError(
                    f"{field}: got {value!r}, which is no {protocol.__name__}"
                    f"{' or None' if optional else ''}."
                )
        self._check_needs()

    def _check_needs(self) -> None:
        members: dict[str, Any] = {field: getattr(self, field) for field in COMPONENTS}
        members["counter"] = self.budget.counter
        for field, strategy in members.items():
            others = [other for name, other in members.items() if name != field]
            offered = INHERENT.union(
                {self.budget.of}, *(getattr(o, "provides", ()) for o in others)
            )
            missing = sorted(frozenset(getattr(strategy, "needs", ())) - offered)
            if missing:
                raise IncompatibleError(
                    f"{field}: {type(strategy).__name__} needs {', '.join(missing)}, which no "
                    "other strategy of this recipe provides; they provide "
                    f"{', '.join(sorted(offered))}. "
                    "Swap one of them, or change what the budget is `of`."
                )

    def to_tables(self, registry: Registry | None = None) -> dict[str, Any]:
        """The recipe as the tables of a recipe file, JSON-serialisable."""
        registry = registry or installed()

        def table(strategy: Any) -> dict[str, Any] | None:
            if strategy is None:
                return None
            return {"name": registry.name_of(strategy), **attrs.asdict(strategy)}

        budget = {"value": self.budget.value, "of": self.budget.of}
        return {
            **{field: table(getattr(self, field)) for field in COMPONENTS},
            "budget": {**budget, "counter": table(self.budget.counter)},
            "experts": self.experts,
            "sampling": attrs.asdict(self.sampling),
            "seed": self.seed,
        }
