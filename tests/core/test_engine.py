"""The engine with toy strategies: its flow, its folder, what it leaves alone, what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import attrs
import numpy as np
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
    Task,
    build_experts,
    engine,
)
from moediff.errors import (
    AnatomyError,
    BudgetError,
    DataError,
    OptionError,
    UnknownNameError,
    WorkdirError,
)
from moediff.plan import REST
from moediff.storage import fingerprint, read_packed
from tests.conftest import tiny_task, tiny_unet
from tests.core import toys
from tests.core.toys import CALLS, Draw, Failing, Greedy, Nudge, PerInterval, recipe

SCHEDULER = DDPMScheduler()
WHOLE = recipe(prepare=Nudge(), recover=Nudge(0.02), seed=3)


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


def same(first: nn.Module, second: nn.Module) -> bool:
    return fingerprint(first) == fingerprint(second)


def test_a_mixture_is_built() -> None:
    net = tiny_unet()
    mixture = build_experts(net, SCHEDULER, tiny_task(), recipe(experts=3))
    assert CALLS == {"cluster": 1, "score": 1, "allocate": 1, "prune": 1}
    assert isinstance(mixture, ExpertMixture)
    assert not any(module.training for module in mixture.modules())
    assert mixture.intervals == Intervals.uniform(1000, 3)
    assert mixture.plan.blueprints[0].drop
    own = sum(p.numel() for p in mixture.experts[0].parameters())
    assert own <= 0.7 * sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        made = mixture(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1000.0])).sample
    assert torch.isfinite(made).all()


def test_every_stage_runs_in_its_order(tmp_path: Path) -> None:
    build_experts(tiny_unet(), SCHEDULER, tiny_task(), WHOLE, tmp_path)
    assert CALLS == {
        "cluster": 1,
        "prepare": 1,
        "score": 3,  # once while preparing, then each of the two tuned experts
        "allocate": 1,
        "prune": 1,
        "recover": 1,
    }


def test_experts_that_are_one_object_are_scored_once_also_without_a_folder() -> None:
    build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(experts=4))
    assert CALLS["score"] == 1


def test_scorers_that_need_intervals_see_each_of_them() -> None:
    build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(scorer=PerInterval(), experts=3))
    assert CALLS["score"] == 3


def test_the_run_folder_holds_the_run(tmp_path: Path) -> None:
    mixture = build_experts(tiny_unet(), SCHEDULER, tiny_task(), WHOLE, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "ledger.json", "mixture", "plan.json", "records.safetensors", "run.json", "stages",
    ]  # fmt: skip
    stages = [f.name.partition("-")[0] for f in (tmp_path / "stages").iterdir()]
    assert sorted(stages) == ["intervals", "plan", "prepare", "recover", *["scores"] * 3]
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == mixture.plan
    assert same(ExpertMixture.from_pretrained(tmp_path / "mixture"), mixture)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["scores"]["samples"] == 3 * 7
    assert ledger["recover"]["steps"] == 1
    assert all(entry["seconds"] >= 0 for entry in ledger.values())
    records, _ = read_packed(tmp_path / "records.safetensors")
    assert set(records) == {"scores/values"}
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["recipe"]["seed"] == 3
    assert run["denoiser"] == fingerprint(tiny_unet())


def test_a_second_call_reads_every_stage(tmp_path: Path) -> None:
    first = build_experts(tiny_unet(), SCHEDULER, tiny_task(), WHOLE, tmp_path)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    CALLS.clear()
    second = build_experts(tiny_unet(), SCHEDULER, tiny_task(), WHOLE, tmp_path)
    assert CALLS == {"prune": 1}  # cutting costs nothing and is not stored
    assert same(first, second)
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
    assert same(first, second)


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
    monkeypatch.setattr(engine, "versions", lambda: {"tests": "2"})  # where the toys are
    build()
    assert CALLS["score"] == 2


def test_prepared_experts_depend_on_given_scores(tmp_path: Path) -> None:
    units = len(moediff.installed().dissect(tiny_unet(), SCHEDULER).anatomy.units)
    for scale in (1.0, 2.0):
        scores = Scores(scale * torch.arange(1.0, units + 1))
        given = {"scores": scores}
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), WHOLE, cache=tmp_path, given=given)
    assert CALLS["prepare"] == 2
    assert CALLS["score"] == 0


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), tmp_path)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")}
    for arguments, reason in [
        ((tiny_unet(), tiny_task(), recipe(seed=1)), "recipe"),
        ((tiny_unet(seed=1), tiny_task(), recipe()), "denoiser"),
        ((tiny_unet(), tiny_task(count=31), recipe()), "task"),
    ]:
        net, task, other = arguments
        with pytest.raises(WorkdirError, match=f"holds another run; it differs in {reason}"):
            build_experts(net, SCHEDULER, task, other, tmp_path)
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")} == before


def test_the_same_seed_gives_the_same_mixture_whatever_ran_before() -> None:
    mixtures = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        mixtures.append(build_experts(tiny_unet(), SCHEDULER, tiny_task(), WHOLE))
    assert same(*mixtures)
    other = build_experts(tiny_unet(), SCHEDULER, tiny_task(), attrs.evolve(WHOLE, seed=4))
    assert not same(mixtures[0], other)


# Given results


def given_plan() -> Plan:
    net = tiny_unet()
    anatomy = moediff.installed().dissect(net, SCHEDULER).anatomy
    blueprint = Blueprint((next(iter(anatomy.layer_units)),))
    return Plan(Intervals((0, 100, 1000)), [blueprint] * 2, {REST: (0, 1)})


def test_given_intervals() -> None:
    given = {"intervals": Intervals((0, 10, 20, 1000))}
    mixture = build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), given=given)
    assert mixture.intervals.cuts == (0, 10, 20, 1000)
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


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(
        UnknownNameError, match=r"given: unknown stage 'score'\. Did you mean 'scores'"
    ):
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), given={"score": None})


# Left as found


def marked() -> nn.Module:
    net = tiny_unet()
    net.train()
    net.mid_block.eval()
    net.conv_in.bias.requires_grad_(False)
    net.conv_out.bias.grad = torch.ones_like(net.conv_out.bias)
    return net


def condition(net: nn.Module) -> dict[str, Any]:
    return {
        "weights": fingerprint(net),
        "modes": [module.training for module in net.modules()],
        "flags": [p.requires_grad for p in net.parameters()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in net.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()],
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
    }


def test_the_denoiser_is_left_as_found() -> None:
    net = marked()
    before = condition(net)
    mixture = build_experts(net, SCHEDULER, tiny_task(), WHOLE)
    assert condition(net) == before
    own = {p.data_ptr() for p in net.parameters()}
    assert not own & {p.data_ptr() for p in mixture.parameters()}


def test_the_denoiser_is_left_as_found_by_a_failing_run(tmp_path: Path) -> None:
    net = marked()
    before = condition(net)
    with pytest.raises(RuntimeError, match="the gate broke"):
        build_experts(net, SCHEDULER, tiny_task(), recipe(gate=Failing()), tmp_path)
    assert condition(net) == before
    assert not (tmp_path / "mixture").exists()


def test_a_denoiser_that_was_frozen_can_be_used_and_stays_frozen() -> None:
    net = tiny_unet().requires_grad_(False)
    with pytest.raises(RuntimeError, match="the gate broke"):  # it takes gradients before
        build_experts(net, SCHEDULER, tiny_task(), recipe(gate=Failing()))
    mixture = build_experts(net, SCHEDULER, tiny_task(), recipe())
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    assert all(p.requires_grad for p in mixture.parameters())


# Refusals


def test_a_denoiser_without_an_anatomy(tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match="no anatomy for a Linear"):
        build_experts(nn.Linear(2, 2), SCHEDULER, tiny_task(), recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("net", "task", "message"),
    [
        (tiny_unet(), Task(torch.zeros(4, 3, 16, 16)), r"shape \(3, 16, 16\); the denoiser takes"),
        (
            tiny_unet(),
            Task(torch.zeros(4, 1, 8, 8)),
            "Read them with that size",
        ),
        (tiny_unet("class-conditional"), tiny_task(), "Pass labels"),
        (tiny_unet(), tiny_task(labelled=True), "Leave the labels out"),
    ],
)
def test_data_that_does_not_fit(net: nn.Module, task: Task, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        build_experts(net, SCHEDULER, task, recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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


def test_a_registry_can_be_handed_in() -> None:
    empty = moediff.Registry.of([], {})
    with pytest.raises(AnatomyError, match="no anatomy for a UNet2DModel"):
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), registry=empty)
