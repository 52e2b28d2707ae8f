"""Stages that are handed in instead of computed: whether they fit, and which ones they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moediff.errors import OptionError, UnknownNameError, did_you_mean
from moediff.mixture import ExpertMixture
from moediff.storage import fingerprint
from moediff.subject import Subject

STAGES = ("intervals", "scores", "experts", "plan", "mixture")


def check_given(given: Mapping[str, Any], subject: Subject, experts: int) -> None:
    """Refuse stages that do not exist, or that do not fit the model or each other.

    Args:
        given: stage -> its result.
        subject: the base model.
        experts: how many the recipe asks for, where no cuts are given.

    Raises:
        UnknownNameError: no such stage.
        OptionError: cuts differ, or numbers of experts or units do.
    """
    for name in given:
        if name not in STAGES:
            raise UnknownNameError(f"given: unknown stage {name!r}.{did_you_mean(name, STAGES)}")
    cuts = {
        name: (given[name] if name == "intervals" else given[name].intervals).cuts
        for name in ("intervals", "plan", "mixture")
        if name in given
    }
    if len(set(cuts.values())) > 1:
        raise OptionError(f"given: the stages disagree about the cuts: {cuts}. Give equal ones.")
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
