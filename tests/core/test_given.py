"""Stages that are handed in: what does not fit is refused, and a folder knows them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from diffusers import DDPMScheduler

import moediff
from moediff import Blueprint, ExpertMixture, Intervals, Plan, Scores, build_experts
from moediff.errors import OptionError, WorkdirError
from moediff.given import check_given, identify
from moediff.plan import REST
from tests.conftest import tiny_task, tiny_unet
from tests.core.toys import recipe

SUBJECT = moediff.installed().dissect(tiny_unet(), DDPMScheduler())
UNITS = len(SUBJECT.anatomy.units)


def plan_at(cut: int) -> Plan:
    return Plan(Intervals((0, cut, 1000)), [Blueprint()] * 2, {REST: (0, 1)})


def test_what_fits_is_taken() -> None:
    for scores in (torch.ones(UNITS), torch.ones(2, UNITS)):
        check_given({"scores": Scores(scores), "plan": plan_at(300)}, SUBJECT, experts=3)
    check_given({"intervals": Intervals((0, 300, 1000)), "plan": plan_at(300)}, SUBJECT, 2)
    check_given({}, SUBJECT, 2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"intervals": Intervals((0, 500, 1000)), "plan": plan_at(300)}, "disagree about the cuts"),
        (
            {
                "plan": plan_at(300),
                "mixture": ExpertMixture.from_experts([SUBJECT] * 2, plan_at(400)),
            },
            "disagree about the cuts",
        ),
        (
            {
                "plan": Plan(plan_at(300).intervals, [Blueprint()] * 2),
                "mixture": ExpertMixture.from_experts([SUBJECT] * 2, plan_at(300)),
            },
            "the plan is not the mixture's",
        ),
        ({"intervals": (0, 500, 1000)}, "got a tuple as intervals; allowed is Intervals"),
        ({"scores": torch.ones(UNITS)}, "got a Tensor as scores; allowed is Scores"),
        ({"plan": plan_at(300).to_json()}, "got a dict as plan; .*from_json"),
        ({"experts": SUBJECT}, "got a Subject as experts; allowed is a sequence of Subject"),
        ({"experts": [SUBJECT.denoiser] * 2}, "got a list as experts"),
        ({"experts": [SUBJECT] * 3}, "got 3 experts for 2 intervals"),
        ({"experts": [SUBJECT], "plan": plan_at(300)}, "got 1 experts for 2 intervals"),
        ({"scores": Scores(torch.ones(UNITS + 1))}, rf"allowed are \({UNITS},\) and \(2, {UNITS}"),
        ({"scores": Scores(torch.ones(3, UNITS))}, rf"got scores of shape \(3, {UNITS}\)"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        check_given(given, SUBJECT, experts=2)


def test_every_given_stage_is_known_again_by_its_content() -> None:
    moved = attrs.evolve(SUBJECT, denoiser=tiny_unet(seed=1))
    ones = torch.ones(UNITS)
    pairs: list[tuple[str, Any, Any, Any]] = [
        ("intervals", Intervals((0, 1000)), Intervals((0, 1000)), Intervals((0, 1, 1000))),
        ("scores", Scores(ones), Scores(ones.clone()), Scores(2 * ones)),
        ("experts", [SUBJECT], (SUBJECT,), [moved]),
        ("plan", plan_at(1), plan_at(1), plan_at(2)),
        ("mixture", *(ExpertMixture.from_experts(e, plan_at(9)) for e in (
            [SUBJECT] * 2, [SUBJECT] * 2, [moved] * 2
        ))),
    ]  # fmt: skip
    for name, first, same, other in pairs:
        assert identify({name: first}) == identify({name: same})
        assert identify({name: first}) != identify({name: other})


def test_a_folder_is_not_gone_on_with_for_another_plan(tmp_path: Path) -> None:
    def build(plan: Plan) -> None:
        net = tiny_unet()
        build_experts(net, DDPMScheduler(), tiny_task(), recipe(), tmp_path, given={"plan": plan})

    build(plan_at(300))
    build(plan_at(300))
    with pytest.raises(WorkdirError, match="differs in given"):
        build(plan_at(400))
