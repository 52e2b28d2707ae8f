"""The engine: dissect, cluster, score, prepare, allocate, prune, recover. One value per arrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
from torch import nn

from moediff.artefact import storable
from moediff.given import check_given, identify
from moediff.mixture import ExpertMixture
from moediff.recipe import Recipe
from moediff.registry import Registry, installed
from moediff.stages import Stages
from moediff.storage import fingerprint, settings, write_json, write_packed
from moediff.subject import Subject, preserved, takes_labels
from moediff.task import Task
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
        OptionError: the recipe's sampling or `given` does not.
        BudgetError: the budget is under the reachable floor.
        WorkdirError: the folder holds another run.
    """
    registry, given = registry or installed(), dict(given or {})
    subject = registry.dissect(denoiser, scheduler)
    if "mixture" in given:
        given.setdefault("plan", given["mixture"].plan)
    check_given(given, subject, recipe.experts)
    classes = getattr(denoiser.config, "num_class_embeds", None)
    task.check(subject.shape, takes_labels(denoiser), classes)
    recipe.sampling.prepare(scheduler)  # refuses what cannot be sampled, before anything is done
    run = _open(subject, task, recipe, workdir, cache, given, verbose, registry)
    stages = Stages(recipe, task, given, run, registry)

    with ExitStack() as stack:
        for expert in (subject, *given.get("experts", ())):
            stack.enter_context(preserved(expert.denoiser))
        intervals = stages.cluster(subject)
        experts: Sequence[Subject] = subject.split(intervals)
        rank = stages.rank(intervals)
        experts = stages.prepare(experts, rank, intervals)
        spaces = [rank(expert) for expert in experts if "plan" not in given]
        plan = stages.allocate(experts, spaces, intervals)
        mixture = stages.prune(experts, plan)
        mixture = stages.recover(mixture, subject)

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
            "scheduler": fingerprint(
                type(subject.scheduler).__name__, settings(subject.scheduler.config)
            ),
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
