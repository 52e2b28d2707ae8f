"""The rows that the papers' tables have in common."""

from __future__ import annotations

import attrs
import torch

import moediff
from benchmarks.rows import Row, Trained, measure, train, trained
from benchmarks.settings import Setting
from moediff import Budget, Recipe
from moediff.roles import Gate
from moediff_plugins.clusterers.alignment import Alignment
from moediff_plugins.counters.macs import MACs
from moediff_plugins.gates.era import ERA
from moediff_plugins.gates.independent import Independent
from moediff_plugins.scorers.ablation_l1_sketch import AblationL1Sketch
from moediff_plugins.tuners.distill import Distill
from moediff_plugins.tuners.elastic import Elastic
from moediff_plugins.tuners.finetune import Finetune

BASE_TUNED = "base, fine-tuned"

PARTS = 5
"""Masks, elastic depth and elastic width have one part each of a row's batches."""

PENALTY = 3.0
"""Weight of R in Eq. 15, see `ERA`: with 1, experts without elastic tuning miss the budget."""

RATE = 1e-2
"""Of the masks. The paper has 1e-3, for two hundred times as many steps."""

GATES = (
    f"Masks are learned at a rate of {RATE:g} and R weighs {PENALTY:g}, in the paper 0.001 and 1, "
    "because the steps are few; `gap` is how far they were from the budget before they were "
    "rounded to meet it, as a share of it."
)


SCORED = "MoEDM's scores are its ablation's, sketched over samplings of 10 steps."
TAUGHT = SCORED[:-1] + ", and its teacher's images are such samplings too."
"""What a table of MoEDM has to say of `moedm`, without a teacher and with one."""


def moedm(on: Setting, *, real: bool = False) -> Recipe:
    """MoEDM at this setting's size, its scores (Eq. 1) by the sketch.

    Args:
        on: the setting.
        real: train on the task's own images with the denoising loss, instead of distilling.
    """
    recover = Distill(
        steps=on.steps,
        batch=on.batch,
        learning_rate=on.rate,
        precision=on.precision,
        images=0 if real else on.teacher,
        mix=1.0 if real else 0.0,
    )
    scoring = attrs.evolve(on.sampling, steps=min(10, on.sampling.steps))
    return moediff.load_recipe(
        "moedm", scorer=AblationL1Sketch(images=on.noises), recover=recover, sampling=scoring
    )


def diffpruning(
    on: Setting,
    budget: float = 0.5,
    *,
    experts: int = 2,
    era: bool = True,
    depth: bool = True,
    width: bool = True,
) -> Recipe:
    """DiffPruning at this setting's size, whole or without some of its parts.

    Whatever is left out, a row has as many optimiser batches, summed over experts and stages: a
    fifth each for masks, elastic depth and elastic width, and what remains for fine-tuning.

    Args:
        on: the setting.
        budget: share of the base model's MACs.
        experts: N.
        era: masks from the Expert Routing Agent, otherwise independent ones.
        depth: with elastic depth.
        width: with elastic width.
    """
    part = on.steps // PARTS
    elastic = Elastic(
        depth * part,
        width * part,
        batch=on.batch,
        subnets=0,
        learning_rate=on.rate,
        precision=on.precision,
    )
    kind = ERA if era else Independent
    gate: Gate = kind(
        steps=max(1, part // experts), batch=on.batch, learning_rate=RATE, penalty=PENALTY
    )
    rest = on.steps - part * (1 + depth + width)
    return moediff.load_recipe(
        "diffpruning",
        clusterer=Alignment(images=on.aligned),
        prepare=elastic if depth or width else None,
        gate=gate,
        recover=attrs.evolve(finetune(on), steps=rest),
        budget=Budget(budget, MACs()),
        experts=experts,
        sampling=on.sampling,
    )


def from_scratch(on: Setting, recipe: Recipe, name: str) -> Row:
    """The architecture of another row, with the weights that training any such model begins from.

    Args:
        on: the setting.
        recipe: of the other row.
        name: of the other row.
    """

    def row(seed: int) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = type(on.subject.denoiser).from_config(on.subject.denoiser.config)
        plan = train(recipe, on, name, seed).plan
        subject = moediff.installed().dissect(fresh.to(on.subject.device), on.subject.scheduler)
        tuned = attrs.evolve(
            recipe, prepare=None, recover=attrs.evolve(recipe.recover, steps=on.steps)
        )
        other = attrs.evolve(on, subject=subject)
        made = train(tuned, other, f"{name} from scratch", seed, {"plan": plan})
        return measure(made, on, seed)

    return Row(row, (recipe, "from scratch"))


def finetune(on: Setting) -> Finetune:
    """Fine-tuning with as many steps as every other row has."""
    return Finetune(steps=on.steps, batch=on.batch, learning_rate=on.rate, precision=on.precision)


def base_rows(on: Setting) -> dict[str, Row]:
    """The base model as it is, and fine-tuned as a whole on the task for the same steps."""
    tuned = attrs.evolve(moedm(on), experts=1, recover=finetune(on))
    return {
        "base": Row(lambda seed: measure(Trained(on.subject.denoiser, on.whole), on, seed)),
        BASE_TUNED: trained(tuned, on, BASE_TUNED, {"plan": on.whole}),
    }
