"""The engine: dissect, cluster, score, prepare, allocate, prune, recover. One value per arrow."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
from torch import nn

from moediff.artefact import storable
from moediff.errors import BudgetError, NoEffectWarning, OptionError
from moediff.given import check_given, identify
from moediff.mixture import ExpertMixture
from moediff.plan import REST, Blueprint, Plan
from moediff.recipe import Recipe
from moediff.registry import Registry, installed, versions
from moediff.space import Scores, SearchSpace
from moediff.storage import (
    Packed,
    Tensors,
    fingerprint,
    settings,
    write_json,
    write_packed,
)
from moediff.subject import Subject, preserved
from moediff.task import Task
from moediff.timesteps import Intervals
from moediff.workdir import Run, claim


def build_experts(
    denoiser: nn.Module,
    scheduler: Any,
    task: Task,
    recipe: Recipe,
    workdir: str | Path | None = None,
    given: Mapping[str, Any] | None = None,
    *,
    cache: str | Path | None = None,
    verbose: bool = False,
    registry: Registry | None = None,
) -> ExpertMixture:
    """Turn a pretrained denoiser into a mixture of efficient timestep experts.

    Args:
        denoiser: any model with an installed anatomy; left as it was found.
        scheduler: the scheduler that it was trained with.
        task: the user's data.
        recipe: which strategies to use, the budget and the seed.
        workdir: the run's folder; a run that was killed goes on there. None keeps nothing.
        given: results to use instead of computing them, by stage: `intervals`, `scores`,
            `experts` (N Subjects), `plan`, `mixture`.
        cache: the folder of stage results, to share between runs; `workdir/stages` by default.
        verbose: draw progress bars.
        registry: where anatomies are looked up; the installed plugins by default.

    Returns:
        The mixture, in eval mode.

    Raises:
        DataError: the task does not fit the denoiser.
        BudgetError: the budget is under the reachable floor.
        WorkdirError: the folder holds another run.
    """
    registry, given = registry or installed(), dict(given or {})
    subject = registry.dissect(denoiser, scheduler)
    if "mixture" in given:
        given.setdefault("plan", given["mixture"].plan)
    check_given(given, subject, recipe.experts)
    classes = getattr(denoiser.config, "num_class_embeds", None)
    task.check(subject.shape, getattr(denoiser, "class_embedding", None) is not None, classes)
    run = _open(subject, task, recipe, workdir, cache, given, verbose, registry)

    with preserved(denoiser):
        intervals = _intervals(subject, task, recipe, run, given)
        experts: Sequence[Subject] = subject.split(intervals)
        rank = _rank(intervals, task, recipe, run, given)
        experts = _prepare(experts, rank, intervals, task, recipe, run, given)
        spaces = [rank(expert) for expert in experts if "plan" not in given]
        plan = _allocate(experts, spaces, intervals, task, recipe, run, given)
        mixture = given.get("mixture") or recipe.pruner.prune(experts, plan)
        mixture = _recover(mixture, task, subject, recipe, run, given)

    if workdir is not None:
        mixture.save_pretrained(Path(workdir, "mixture"))
        write_json(Path(workdir, "plan.json"), plan.to_json())
        write_json(
            Path(workdir, "ledger.json"), {k: attrs.asdict(v) for k, v in run.ledger.items()}
        )
        write_packed(Path(workdir, "records.safetensors"), (run.records, {}))
    return mixture


def _open(
    subject: Subject,
    task: Task,
    recipe: Recipe,
    workdir: str | Path | None,
    cache: str | Path | None,
    given: Mapping[str, Any],
    verbose: bool,
    registry: Registry,
) -> Run:
    folder = cache or (workdir and Path(workdir, "stages"))
    if folder:
        storable(type(subject.denoiser).__name__)
    if workdir is not None:
        identity = {
            "recipe": recipe.to_tables(registry),
            "denoiser": fingerprint(subject.denoiser),
            "task": fingerprint(task),
            "classes": task.classes,
            "given": identify(given),
        }
        claim(Path(workdir), identity)
    return Run(
        sampling=recipe.sampling,
        experts=recipe.experts,
        seed=recipe.seed,
        device=subject.device,
        cache=Path(folder) if folder else None,
        verbose=verbose,
    )


def _depends(subjects: Sequence[Subject], task: Task, run: Run, *values: Any) -> tuple[Any, ...]:
    """What every stage depends on: code, weights, schedule, data, sampling, and the strategy."""
    weights = {id(s.denoiser): s.denoiser for s in subjects}
    packages = sorted({type(value).__module__.partition(".")[0] for value in values})
    return (
        version("moediff"), [versions().get(package, "") for package in packages],
        [*weights.values()], settings(subjects[0].scheduler.config),
        [s.interval for s in subjects], task, run.sampling, run.experts, *values,
    )  # fmt: skip


def _intervals(
    subject: Subject, task: Task, recipe: Recipe, run: Run, given: Mapping[str, Any]
) -> Intervals:
    if "intervals" in given or "plan" in given:
        intervals: Intervals = given.get("intervals") or given["plan"].intervals
    else:
        Intervals.uniform(subject.total, recipe.experts)  # refuses too many experts
        intervals = run.stage(
            "intervals",
            _depends([subject], task, run, recipe.clusterer),
            lambda: recipe.clusterer.cluster(subject, task, run),
            pack=lambda result: ({}, list(result.cuts)),
            unpack=lambda tensors, cuts: Intervals(cuts),
        )
    if intervals.total != subject.total:
        raise OptionError(
            f"intervals: cover [0, {intervals.total}); the scheduler has {subject.total} "
            "timesteps. Cut those."
        )
    return intervals


def _rank(
    intervals: Intervals, task: Task, recipe: Recipe, run: Run, given: Mapping[str, Any]
) -> Callable[[Subject], SearchSpace]:
    by_interval = "intervals" in getattr(recipe.scorer, "needs", ())
    known: dict[str, Scores] = {}

    def rank(expert: Subject) -> SearchSpace:
        # Without this, experts that are one object would be scored once each.
        scored = expert if by_interval else attrs.evolve(expert, interval=(0, expert.total))
        if "scores" in given:
            index = int(intervals.route(expert.interval[0]))
            return recipe.pruner.space(expert, given["scores"].expert(index))
        depends = _depends([scored], task, run, recipe.scorer)
        key = fingerprint(*depends)
        if key not in known:
            known[key] = run.stage(
                "scores",
                depends,
                lambda: recipe.scorer.score(scored, task, run),
                pack=lambda s: ({"values": s.values}, s.comparable),
                unpack=lambda tensors, comparable: Scores(tensors["values"], comparable),
            )
        return recipe.pruner.space(expert, known[key])

    return rank


def _prepare(
    experts: Sequence[Subject],
    rank: Callable[[Subject], SearchSpace],
    intervals: Intervals,
    task: Task,
    recipe: Recipe,
    run: Run,
    given: Mapping[str, Any],
) -> Sequence[Subject]:
    if "experts" in given:
        return tuple(given["experts"])
    if recipe.prepare is None or "mixture" in given:
        return experts
    tuner = recipe.prepare

    def unpack(tensors: Tensors, _: Any) -> Sequence[Subject]:
        return tuple(_with_weights(e, tensors, f"{i}.") for i, e in enumerate(experts))

    return run.stage(
        "prepare",
        _depends(experts, task, run, tuner, recipe.scorer, recipe.pruner, given.get("scores")),
        lambda: tuner.prepare(experts, rank, intervals, task, run),
        pack=_pack_experts,
        unpack=unpack,
    )


def _pack_experts(experts: Sequence[Subject]) -> Packed:
    states = [expert.denoiser.state_dict() for expert in experts]
    return {f"{i}.{name}": v for i, state in enumerate(states) for name, v in state.items()}, None


def _with_weights(expert: Subject, tensors: Tensors, prefix: str) -> Subject:
    denoiser = copy.deepcopy(expert.denoiser)
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    denoiser.load_state_dict(state)
    return attrs.evolve(expert, denoiser=denoiser)


def _allocate(
    experts: Sequence[Subject],
    spaces: Sequence[SearchSpace],
    intervals: Intervals,
    task: Task,
    recipe: Recipe,
    run: Run,
    given: Mapping[str, Any],
) -> Plan:
    if "plan" in given:
        plan: Plan = given["plan"]
    else:
        ranked = [(space.chains, space.scores) for space in spaces]

        def compute() -> Plan:
            found = recipe.gate.allocate(experts, spaces, intervals, recipe.budget, task, run)
            # Not of a stored plan: what is measured, as a latency, is another day another price.
            prices = recipe.budget.counter.price(experts[0])
            share = found.cost(prices, run.sampling)[recipe.budget.of] / prices.full
            if share > recipe.budget.value * 1.01:
                raise BudgetError(
                    f"budget: the gate {type(recipe.gate).__name__} returned a plan at {share:.4f} "
                    f"of the base model; asked was {recipe.budget.value:.4f}. This is the gate's "
                    "error."
                )
            return found

        plan = run.stage(
            "plan",
            _depends(experts, task, run, recipe.gate, recipe.budget, recipe.budget.counter, ranked),
            compute,
            pack=lambda result: ({}, result.to_json()),
            unpack=lambda tensors, data: Plan.from_json(data),
        )
        kept_whole = all(blueprint == Blueprint() for blueprint in plan.blueprints)
        if kept_whole and all(plan.copy_numbers(x)[-1] == 0 for x in (REST, *plan.copies)):
            warnings.warn(
                "plan: nothing is removed and nothing is copied; the mixture is the base model.",
                NoEffectWarning,
                stacklevel=3,
            )
    plan.check(experts[0].anatomy)
    return plan


def _recover(
    mixture: ExpertMixture,
    task: Task,
    teacher: Subject,
    recipe: Recipe,
    run: Run,
    given: Mapping[str, Any],
) -> ExpertMixture:
    if recipe.recover is None or "mixture" in given:
        mixture.eval()
        return mixture
    tuner = recipe.recover

    def compute() -> ExpertMixture:
        recovered = tuner.recover(mixture, task, teacher, run)
        recovered.eval()
        return recovered

    def unpack(tensors: Tensors, data: Any) -> ExpertMixture:
        stored = ExpertMixture.unpack(tensors, data)  # on the CPU
        stored.to(run.device)
        return stored

    return run.stage(
        "recover",
        _depends([teacher], task, run, tuner, mixture.pack()),
        compute,
        pack=ExpertMixture.pack,
        unpack=unpack,
    )
