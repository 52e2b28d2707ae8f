"""Stages that are handed in instead of computed: whether they fit, and which ones they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moediff.errors import OptionError, UnknownNameError, did_you_mean
from moediff.mixture import ExpertMixture
from moediff.plan import Plan
from moediff.space import Scores
from moediff.storage import fingerprint
from moediff.subject import Subject
from moediff.timesteps import Intervals

STAGES: dict[str, type] = {
    "intervals": Intervals,
    "scores": Scores,
    "experts": Subject,  # one per interval
    "plan": Plan,
    "mixture": ExpertMixture,
}
"""Stage -> what its result is."""


def check_given(given: Mapping[str, Any], subject: Subject, experts: int) -> None:
    """Refuse stages that do not exist, or that do not fit the model or each other.

    Args:
        given: stage -> its result.
        subject: the base model.
        experts: how many the recipe asks for, where no cuts are given.

    Raises:
        UnknownNameError: no such stage.
        OptionError: a result is of another type, cuts differ, or numbers of experts or units do.
    """
    for name, value in given.items():
        if name not in STAGES:
            raise UnknownNameError(f"given: unknown stage {name!r}.{did_you_mean(name, STAGES)}")
        several = name == "experts"
        parts = value if several and isinstance(value, Sequence) else [value]
        fits = all(isinstance(part, STAGES[name]) for part in parts)
        if not fits or several != isinstance(value, Sequence):
            raise OptionError(
                f"given: got a {type(value).__name__} as {name}; allowed is "
                f"{'a sequence of ' if several else ''}{STAGES[name].__name__}. "
                "`Plan.from_json` reads a stored plan, `Scores` and `Intervals` take plain values."
            )
    cuts = {
        name: (given[name] if name == "intervals" else given[name].intervals).cuts
        for name in ("intervals", "plan", "mixture")
        if name in given
    }
    if len(set(cuts.values())) > 1:
        raise OptionError(f"given: the stages disagree about the cuts: {cuts}. Give equal ones.")
    if "mixture" in given and given.get("plan", given["mixture"].plan) != given["mixture"].plan:
        raise OptionError("given: the plan is not the mixture's. Leave the plan out.")
    count = len(next(iter(cuts.values()))) - 1 if cuts else experts
    if "experts" in given and len(given["experts"]) != count:
        raise OptionError(
            f"given: got {len(given['experts'])} experts for {count} intervals. Give one each."
        )
    units = len(subject.anatomy.units)
    shape = tuple(given["scores"].values.shape) if "scores" in given else (units,)
    if shape not in ((units,), (count, units)):
        raise OptionError(
            f"given: got scores of shape {shape}; allowed are ({units},) and ({count}, {units}), "
            "one per unit of the model. Score this model."
        )


def identify(given: Mapping[str, Any]) -> dict[str, str]:
    """A hash of every given stage, by which a run's folder knows it again."""
    return {name: _hash(value) for name, value in sorted(given.items())}


def _hash(value: Any) -> str:
    if isinstance(value, ExpertMixture):
        return fingerprint(value.pack())
    if isinstance(value, Sequence):  # of experts
        return fingerprint([expert.denoiser for expert in value])
    return fingerprint(value)
