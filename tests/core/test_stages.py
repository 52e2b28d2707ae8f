"""Stages with toy strategies: what is read again, what may be handed in, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

import moediff
from moediff import (
    Blueprint,
    Budget,
    ExpertMixture,
    Intervals,
    NoEffectWarning,
    Plan,
    Scores,
    build_experts,
    mixture,
    stages,
)
from moediff.anatomy import Anatomy
from moediff.errors import BudgetError, OptionError, PlanError, UnknownNameError
from moediff.plan import REST
from moediff.storage import fingerprint
from tests.conftest import tiny_task, tiny_unet
from tests.core import toys
from tests.core.mixtures import equal
from tests.core.toys import CALLS, Draw, Greedy, Nudge, PerInterval, recipe

SCHEDULER = DDPMScheduler()
WHOLE = recipe(prepare=Nudge(), recover=Nudge(0.02), seed=3)


def test_experts_that_are_one_object_are_scored_once_also_without_a_folder() -> None:
    build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(experts=4))
    assert CALLS["score"] == 1


def test_scorers_that_need_intervals_see_each_of_them() -> None:
    build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(scorer=PerInterval(), experts=3))
    assert CALLS["score"] == 3


def test_a_second_call_reads_every_stage(tmp_path: Path) -> None:
    first = build_experts(tiny_unet(), SCHEDULER, tiny_task(), WHOLE, tmp_path)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    CALLS.clear()
    second = build_experts(tiny_unet(), SCHEDULER, tiny_task(), WHOLE, tmp_path)
    assert CALLS == {"prune": 1}  # cutting costs nothing and is not stored
    assert equal(first, second)
    assert second.plan == first.plan
    again = json.loads((tmp_path / "ledger.json").read_text())
    spent = [{k: (v["samples"], v["steps"]) for k, v in book.items()} for book in (ledger, again)]
    assert spent[0] == spent[1]


def test_a_run_that_lost_its_last_stage_computes_only_that(tmp_path: Path) -> None:
    first = build_experts(tiny_unet(), SCHEDULER, tiny_task(), WHOLE, tmp_path)
    (stored,) = (tmp_path / "stages").glob("recover-*")
    stored.unlink()
    CALLS.clear()
    second = build_experts(tiny_unet(), SCHEDULER, tiny_task(), WHOLE, tmp_path)
    assert CALLS == {"prune": 1, "recover": 1}
    assert equal(first, second)


def test_swapping_the_gate_does_not_score_again(tmp_path: Path) -> None:
    @attrs.frozen
    class Other(Greedy):
        """Another gate."""

    for index, gate in enumerate((Greedy(), Other())):
        CALLS.clear()
        folder, cache = tmp_path / str(index), tmp_path / "cache"
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(gate=gate), folder, cache=cache)
    assert CALLS == {"allocate": 1, "prune": 1}


CHANGED: dict[str, Any] = {
    "weights": lambda: (tiny_unet(seed=1), tiny_task(), recipe()),
    "data": lambda: (tiny_unet(), tiny_task(count=31), recipe()),
    "scorer": lambda: (tiny_unet(), tiny_task(), recipe(scorer=Draw(2.0))),
    "seed": lambda: (tiny_unet(), tiny_task(), recipe(seed=1)),
    "steps": lambda: (tiny_unet(), tiny_task(), recipe(sampling=moediff.Sampling(steps=5))),
}


@pytest.mark.parametrize("kind", sorted(CHANGED))
def test_whatever_scores_depend_on_scores_again(tmp_path: Path, kind: str) -> None:
    build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), cache=tmp_path)
    CALLS.clear()
    net, task, changed = CHANGED[kind]()
    build_experts(net, SCHEDULER, task, changed, cache=tmp_path)
    assert CALLS["score"] == 1


def test_another_release_of_a_plugin_computes_its_stages_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> None:
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), cache=tmp_path)

    build()
    build()
    assert CALLS["score"] == 1
    monkeypatch.setattr(stages, "versions", lambda: {"tests": "2"})  # where the toys are
    build()
    assert CALLS["score"] == 2


def test_a_run_with_a_registry_of_its_own_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = moediff.installed()
    monkeypatch.setattr(mixture, "installed", lambda: moediff.Registry.of([], {}))
    arguments = (tiny_unet(), SCHEDULER, tiny_task(), WHOLE, tmp_path)
    first = build_experts(*arguments, registry=own)
    CALLS.clear()
    second = build_experts(*arguments, registry=own)
    assert CALLS == {"prune": 1}
    loaded = ExpertMixture.from_pretrained(tmp_path / "mixture", registry=own)
    assert equal(first, second)
    assert equal(first, loaded)


def test_prepared_experts_depend_on_given_scores(tmp_path: Path) -> None:
    units = len(moediff.installed().dissect(tiny_unet(), SCHEDULER).anatomy.units)
    for scale in (1.0, 2.0):
        scores = Scores(scale * torch.arange(1.0, units + 1))
        given = {"scores": scores}
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), WHOLE, cache=tmp_path, given=given)
    assert CALLS["prepare"] == 2
    assert CALLS["score"] == 0


# Given results


def given_plan() -> Plan:
    net = tiny_unet()
    anatomy = moediff.installed().dissect(net, SCHEDULER).anatomy
    blueprint = Blueprint((next(iter(anatomy.layer_units)),))
    return Plan(Intervals((0, 100, 1000)), [blueprint] * 2, {REST: (0, 1)})


def test_given_intervals() -> None:
    given = {"intervals": Intervals((0, 10, 300, 1000))}
    mixture = build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), given=given)
    assert mixture.intervals.cuts == (0, 10, 300, 1000)
    assert CALLS["cluster"] == 0


def test_given_scores() -> None:
    anatomy = moediff.installed().dissect(tiny_unet(), SCHEDULER).anatomy
    values = torch.arange(1.0, len(anatomy.units) + 1)
    given = {"scores": Scores(values)}
    mixture = build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), given=given)
    assert CALLS["score"] == 0
    dropped = mixture.plan.blueprints[0].drop
    assert set(dropped) == set(list(anatomy.layer_units)[: len(dropped)])  # the lowest first


def test_given_experts() -> None:
    base = moediff.installed().dissect(tiny_unet(), SCHEDULER)
    experts = [
        attrs.evolve(base, denoiser=tiny_unet(seed=seed), interval=span)
        for seed, span in ((7, (0, 500)), (8, (500, 1000)))
    ]
    before = [fingerprint(expert.denoiser) for expert in experts]
    given = {"experts": experts}
    tuned = recipe(prepare=Nudge())
    mixture = build_experts(base.denoiser, SCHEDULER, tiny_task(), tuned, given=given)
    assert CALLS["prepare"] == 0
    assert [fingerprint(expert.denoiser) for expert in experts] == before
    assert torch.equal(mixture.experts[0].conv_in.weight, experts[0].denoiser.conv_in.weight)


def test_given_plan() -> None:
    plan = given_plan()
    mixture = build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), given={"plan": plan})
    assert CALLS == {"prune": 1}
    assert mixture.plan == plan


def test_given_mixture(tmp_path: Path) -> None:
    base = moediff.installed().dissect(tiny_unet(), SCHEDULER)
    plan = given_plan()
    mixture = ExpertMixture.from_experts([base, base], plan)
    given = {"mixture": mixture}
    built = build_experts(base.denoiser, SCHEDULER, tiny_task(), WHOLE, tmp_path, given=given)
    assert built is mixture
    assert CALLS == {}
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == plan


def test_more_experts_than_timesteps() -> None:
    scheduler = DDPMScheduler(num_train_timesteps=5)
    with pytest.raises(OptionError, match="experts: got 6; allowed is 1 to 5"):
        build_experts(tiny_unet(), scheduler, tiny_task(), recipe(experts=6))
    assert CALLS["cluster"] == 0


def test_intervals_of_another_schedule() -> None:
    given = {"intervals": Intervals((0, 50, 100))}
    with pytest.raises(OptionError, match=r"cover \[0, 100\); the scheduler has 1000"):
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), given=given)


def test_a_gate_that_overspends_is_named() -> None:
    with pytest.raises(
        BudgetError, match=r"the gate Greedy returned a plan at .* asked was 0\.0100"
    ):
        build_experts(
            tiny_unet(), SCHEDULER, tiny_task(), recipe(budget=Budget(0.01, toys.Count()))
        )


def test_a_plan_that_does_not_fit_the_denoiser() -> None:
    plan = Plan(Intervals((0, 1000)), [Blueprint(("nowhere",))])
    with pytest.raises(UnknownNameError, match="drop: got 'nowhere'"):
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), given={"plan": plan})


def test_removing_nothing_warns() -> None:
    whole = recipe(budget=Budget(1, toys.Count()), experts=1)
    with pytest.warns(NoEffectWarning, match="nothing is removed and nothing is copied"):
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), whole)


def test_intervals_that_are_never_sampled_warn() -> None:
    given = {"intervals": Intervals((0, 990, 1000))}
    with pytest.warns(NoEffectWarning, match=r"ddim, 4 steps\) never calls \[990, 1000\)"):
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), given=given)


def test_experts_of_other_intervals_are_refused() -> None:
    base = moediff.installed().dissect(tiny_unet(), SCHEDULER)
    given = {"experts": base.split(Intervals((0, 100, 1000)))}
    with pytest.raises(OptionError, match=r"answer for \[\(0, 100\), .*intervals are \[\(0, 500\)"):
        build_experts(base.denoiser, SCHEDULER, tiny_task(), recipe(), given=given)


def test_experts_that_were_trained_apart_may_not_share(tmp_path: Path) -> None:
    plan = attrs.evolve(given_plan(), copies={}, intervals=Intervals.uniform(1000, 2))
    with pytest.raises(PlanError, match=r"trained apart.*copies=\{'\*': \(0, 1\)\}"):
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), WHOLE, given={"plan": plan})


def test_handed_in_experts_are_in_eval_mode_meanwhile() -> None:
    base = moediff.installed().dissect(tiny_unet(), SCHEDULER)
    experts = [
        attrs.evolve(expert, denoiser=tiny_unet(seed=seed).train())
        for seed, expert in enumerate(base.split(Intervals.uniform(1000, 2)))
    ]
    modes = []

    @attrs.frozen
    class Watching(Greedy):
        """Notes the experts' modes."""

        def allocate(self, experts: Any, *others: Any) -> Plan:
            modes.extend(expert.denoiser.training for expert in experts)
            return Greedy().allocate(experts, *others)

    watching = recipe(gate=Watching())
    build_experts(base.denoiser, SCHEDULER, tiny_task(), watching, given={"experts": experts})
    assert modes == [False, False]
    assert all(expert.denoiser.training for expert in experts)


def test_plans_depend_on_which_expert_has_which_weights(tmp_path: Path) -> None:
    base = moediff.installed().dissect(tiny_unet(), SCHEDULER)
    spans, nets = Intervals.uniform(1000, 3), (base.denoiser, tiny_unet(seed=1))
    for places in ((0, 0, 1), (0, 1, 1)):
        pairs = zip(base.split(spans), places, strict=True)
        experts = [attrs.evolve(expert, denoiser=nets[place]) for expert, place in pairs]
        arguments = (base.denoiser, SCHEDULER, tiny_task(), recipe(experts=3))
        build_experts(*arguments, cache=tmp_path, given={"experts": experts})
    assert CALLS["allocate"] == 2


def test_scores_depend_on_the_anatomy(tmp_path: Path) -> None:
    @attrs.frozen
    class Fewer:
        """An anatomy without the last layer."""

        def supports(self, denoiser: nn.Module) -> bool:
            return True

        def dissect(self, denoiser: nn.Module) -> Anatomy:
            whole = moediff.installed().create("anatomies", "unet2d", {}).dissect(denoiser)
            return Anatomy(whole.layers[:-1])

    class Plugin:
        @staticmethod
        @moediff.hookimpl
        def anatomies() -> dict[str, type]:
            return {"fewer": Fewer}

    for registry in (moediff.installed(), moediff.Registry.of([("fewer", Plugin)], {})):
        arguments = (tiny_unet(), SCHEDULER, tiny_task(), recipe())
        build_experts(*arguments, cache=tmp_path, registry=registry)
    assert CALLS["score"] == 2
