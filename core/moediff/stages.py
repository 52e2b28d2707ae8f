"""The stages of a run: each result is handed in, read from the run's folder, or computed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import attrs

from moediff.errors import BudgetError, NoEffectWarning, OptionError
from moediff.mixture import ExpertMixture
from moediff.plan import REST, Blueprint, Plan
from moediff.recipe import Recipe
from moediff.registry import Registry, versions
from moediff.roles import Rank
from moediff.space import Scores, SearchSpace
from moediff.storage import Packed, Tensors, fingerprint, settings
from moediff.subject import Subject
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run


@attrs.frozen(eq=False)
class Stages:
    """What one run's stages have in common; a method per arrow of the engine.

    Attributes:
        recipe: whose strategies compute.
        task: the user's data.
        given: results to use instead, by stage.
        run: keeps what is computed.
        registry: where a stored mixture's anatomy is looked up.
    """

    recipe: Recipe
    task: Task
    given: Mapping[str, Any]
    run: Run
    registry: Registry

    def cluster(self, subject: Subject) -> Intervals:
        """Divide the timesteps of the base model.

        Raises:
            OptionError: the cuts are of another schedule.
        """
        recipe, total = self.recipe, subject.total
        if "intervals" in self.given or "plan" in self.given:
            intervals: Intervals = self.given.get("intervals") or self.given["plan"].intervals
        else:
            Intervals.uniform(total, recipe.experts)  # refuses too many experts
            intervals = self.run.stage(
                "intervals",
                self._depends([subject], recipe.clusterer),
                lambda: recipe.clusterer.cluster(subject, self.task, self.run),
                pack=lambda result: ({}, list(result.cuts)),
                unpack=lambda tensors, cuts: Intervals(cuts),
            )
        if intervals.total != total:
            raise OptionError(
                f"intervals: cover [0, {intervals.total}); the scheduler has {total} timesteps. "
                "Cut those."
            )
        calls = recipe.sampling.calls(subject.scheduler, intervals)
        spans = zip(intervals, calls, strict=True)
        idle = [f"[{low}, {high})" for (low, high), count in spans if count == 0]
        if idle:
            warnings.warn(
                f"intervals: the recipe's sampling ({recipe.sampling.scheduler}, "
                f"{recipe.sampling.steps} steps) never calls {', '.join(idle)}. Experts there take "
                "up memory, and a budget of live cost says nothing about them. Sample in more "
                "steps, ask for fewer experts, or cut elsewhere.",
                NoEffectWarning,
                stacklevel=3,
            )
        return intervals

    def rank(self, intervals: Intervals) -> Rank:
        """Return what scores an expert, once for each that differs, and orders its units."""
        recipe = self.recipe
        by_interval = "intervals" in getattr(recipe.scorer, "needs", ())
        known: dict[str, Scores] = {}

        def rank(expert: Subject) -> SearchSpace:
            # Without this, experts that are one object would be scored once each.
            scored = expert if by_interval else attrs.evolve(expert, interval=(0, expert.total))
            if "scores" in self.given:
                index = int(intervals.route(expert.interval[0]))
                return recipe.pruner.space(expert, self.given["scores"].expert(index))
            depends = self._depends([scored], recipe.scorer)
            key = fingerprint(*depends)
            if key not in known:
                known[key] = self.run.stage(
                    "scores",
                    depends,
                    lambda: recipe.scorer.score(scored, self.task, self.run),
                    pack=lambda s: ({"values": s.values}, s.comparable),
                    unpack=lambda tensors, comparable: Scores(tensors["values"], comparable),
                )
            return recipe.pruner.space(expert, known[key])

        return rank

    def prepare(
        self, experts: Sequence[Subject], rank: Rank, intervals: Intervals
    ) -> Sequence[Subject]:
        """Train the experts before they are cut, if the recipe does.

        Raises:
            OptionError: experts were handed in, of other intervals.
        """
        if "experts" in self.given:
            handed: Sequence[Subject] = tuple(self.given["experts"])
            spans = [expert.interval for expert in handed]
            if spans != list(intervals):
                raise OptionError(
                    f"given: the experts answer for {spans}; the intervals are {list(intervals)}. "
                    "Give experts of these, or give the intervals, too."
                )
            return handed
        if self.recipe.prepare is None or "mixture" in self.given:
            return experts
        recipe, tuner = self.recipe, self.recipe.prepare

        def unpack(tensors: Tensors, _: Any) -> Sequence[Subject]:
            return tuple(_with_weights(e, tensors, f"{i}.") for i, e in enumerate(experts))

        return self.run.stage(
            "prepare",
            self._depends(experts, tuner, recipe.scorer, recipe.pruner, self.given.get("scores")),
            lambda: tuner.prepare(experts, rank, intervals, self.task, self.run),
            pack=_pack_experts,
            unpack=unpack,
        )

    def allocate(
        self, experts: Sequence[Subject], spaces: Sequence[SearchSpace], intervals: Intervals
    ) -> Plan:
        """Spend the budget.

        Raises:
            BudgetError: the gate spent more than there is, or there is less than must be spent.
            PlanError: the plan does not fit the experts.
        """
        if "plan" in self.given:
            plan: Plan = self.given["plan"]
        else:
            plan = self._planned(experts, spaces, intervals)
            whole = all(blueprint == Blueprint() for blueprint in plan.blueprints)
            if whole and all(plan.copy_numbers(part)[-1] == 0 for part in (REST, *plan.copies)):
                warnings.warn(
                    "plan: nothing is removed and nothing is copied; the mixture is the base "
                    "model. Ask for a smaller budget, or for more experts.",
                    NoEffectWarning,
                    stacklevel=3,
                )
        plan.check(experts[0].anatomy)
        if "mixture" not in self.given:
            plan.check_separate(experts[0].anatomy, [expert.denoiser for expert in experts])
        return plan

    def _planned(
        self, experts: Sequence[Subject], spaces: Sequence[SearchSpace], intervals: Intervals
    ) -> Plan:
        recipe, gate, budget = self.recipe, self.recipe.gate, self.recipe.budget
        ranked = [(space.chains, space.scores) for space in spaces]

        def compute() -> Plan:
            found = gate.allocate(experts, spaces, intervals, budget, self.task, self.run)
            # Not of a stored plan: what is measured, as a latency, is another day another price.
            prices = budget.counter.price(experts[0])
            share = found.cost(prices, recipe.sampling)[budget.of] / prices.full
            if share > budget.value * 1.01:
                raise BudgetError(
                    f"budget: the gate {type(gate).__name__} returned a plan at {share:.4f} of the "
                    f"base model; asked was {budget.value:.4f}. This is the gate's error."
                )
            return found

        return self.run.stage(
            "plan",
            self._depends(experts, gate, budget, budget.counter, ranked),
            compute,
            pack=lambda result: ({}, result.to_json()),
            unpack=lambda tensors, data: Plan.from_json(data),
        )

    def prune(self, experts: Sequence[Subject], plan: Plan) -> ExpertMixture:
        """Cut the experts; quick, so it is not stored."""
        return self.given.get("mixture") or self.recipe.pruner.prune(experts, plan)

    def recover(self, mixture: ExpertMixture, teacher: Subject) -> ExpertMixture:
        """Train the cut experts, if the recipe does, and put the mixture into eval mode."""
        if self.recipe.recover is None or "mixture" in self.given:
            mixture.eval()
            return mixture
        tuner = self.recipe.recover

        def compute() -> ExpertMixture:
            recovered = tuner.recover(mixture, self.task, teacher, self.run)
            recovered.eval()
            return recovered

        def unpack(tensors: Tensors, data: Any) -> ExpertMixture:
            stored = ExpertMixture.unpack(tensors, data, self.registry)  # on the CPU
            stored.to(self.run.device)
            return stored

        return self.run.stage(
            "recover",
            self._depends([teacher], tuner, mixture.pack()),
            compute,
            pack=ExpertMixture.pack,
            unpack=unpack,
        )

    def _depends(self, subjects: Sequence[Subject], *values: Any) -> tuple[Any, ...]:
        """What a stage depends on: code, weights, schedule, data, sampling, and the strategy."""
        weights = {id(s.denoiser): s.denoiser for s in subjects}
        places = [[*weights].index(id(s.denoiser)) for s in subjects]
        packages = sorted({type(value).__module__.partition(".")[0] for value in values})
        return (
            version("moediff"), [versions().get(package, "") for package in packages],
            [*weights.values()], places, subjects[0].anatomy,
            settings(subjects[0].scheduler.config), [s.interval for s in subjects],
            self.task, self.run.sampling, self.run.experts, self.run.device.type, *values,
        )  # fmt: skip


def _pack_experts(experts: Sequence[Subject]) -> Packed:
    states = [expert.denoiser.state_dict() for expert in experts]
    return {f"{i}.{name}": v for i, state in enumerate(states) for name, v in state.items()}, None


def _with_weights(expert: Subject, tensors: Tensors, prefix: str) -> Subject:
    denoiser = copy.deepcopy(expert.denoiser)
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    denoiser.load_state_dict(state)
    return attrs.evolve(expert, denoiser=denoiser)
