"""The rows that the papers' tables have in common."""

from __future__ import annotations

import attrs

import moediff
from benchmarks.settings import Setting
from benchmarks.tables import Row, Trained, measure, trained
from moediff import Recipe
from moediff_plugins.scorers.ablation_l1_sketch import AblationL1Sketch
from moediff_plugins.tuners.distill import Distill
from moediff_plugins.tuners.finetune import Finetune

BASE_TUNED = "base, fine-tuned"


def moedm(on: Setting, *, real: bool = False) -> Recipe:
    """MoEDM at this setting's size.

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


def finetune(on: Setting) -> Finetune:
    """Fine-tuning with as many steps as every other row has."""
    return Finetune(steps=on.steps, batch=on.batch, learning_rate=on.rate, precision=on.precision)


def base_rows(on: Setting) -> dict[str, Row]:
    """The base model as it is, and fine-tuned as a whole on the task for the same steps."""
    tuned = attrs.evolve(moedm(on), experts=1, recover=finetune(on))
    return {
        "base": lambda seed: measure(Trained(on.subject.denoiser, on.whole), on, seed),
        BASE_TUNED: trained(tuned, on, BASE_TUNED, {"plan": on.whole}),
    }
