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
    ExpertMixture,
    Intervals,
    Plan,
    Task,
    build_experts,
)
from moediff.errors import (
    AnatomyError,
    DataError,
    OptionError,
    UnknownNameError,
    WorkdirError,
)
from moediff.storage import fingerprint, read_packed
from tests.conftest import tiny_task, tiny_unet
from tests.core.mixtures import equal
from tests.core.toys import CALLS, Draw, Failing, Nudge, recipe

SCHEDULER = DDPMScheduler()
WHOLE = recipe(prepare=Nudge(), recover=Nudge(0.02), seed=3)


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


def test_the_run_folder_holds_the_run(tmp_path: Path) -> None:
    mixture = build_experts(tiny_unet(), SCHEDULER, tiny_task(), WHOLE, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "ledger.json", "mixture", "plan.json", "records.safetensors", "run.json", "stages",
    ]  # fmt: skip
    stages = [f.name.partition("-")[0] for f in (tmp_path / "stages").iterdir()]
    assert sorted(stages) == ["intervals", "plan", "prepare", "recover", *["scores"] * 3]
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == mixture.plan
    assert equal(ExpertMixture.from_pretrained(tmp_path / "mixture"), mixture)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["scores"]["samples"] == 3 * 7
    assert ledger["recover"]["steps"] == 1
    assert all(entry["seconds"] >= 0 for entry in ledger.values())
    records, _ = read_packed(tmp_path / "records.safetensors")
    assert set(records) == {"scores/values"}
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["recipe"]["seed"] == 3
    assert run["denoiser"] == fingerprint(tiny_unet())


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
    assert equal(*mixtures)
    other = build_experts(tiny_unet(), SCHEDULER, tiny_task(), attrs.evolve(WHOLE, seed=4))
    assert not equal(mixtures[0], other)


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


def test_a_registry_can_be_handed_in() -> None:
    empty = moediff.Registry.of([], {})
    with pytest.raises(AnatomyError, match="no anatomy for a UNet2DModel"):
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), registry=empty)


def test_a_sampling_that_cannot_be_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    flow = recipe(sampling=moediff.Sampling("FlowMatchEulerDiscreteScheduler", 4))
    with pytest.raises(OptionError, match="flow matching samples what flow matching trained"):
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), flow, tmp_path / "run")
    assert not CALLS
    assert not (tmp_path / "run").exists()


@attrs.frozen
class Listing(Draw):
    """A scorer with a sequence among its options."""

    sizes: tuple[Any, ...] = (1, 2)


def test_a_run_whose_strategy_has_a_sequence_goes_on(tmp_path: Path) -> None:
    for _ in range(2):
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(scorer=Listing()), tmp_path)
    assert CALLS["score"] == 1


def test_options_that_no_json_knows_are_refused(tmp_path: Path) -> None:
    pathed = recipe(scorer=Listing(sizes=(tmp_path,)))
    with pytest.raises(OptionError, match=r"PosixPath is not JSON serializable.*numbers, words"):
        build_experts(tiny_unet(), SCHEDULER, tiny_task(), pathed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_knows_its_scheduler_again(tmp_path: Path) -> None:
    build_experts(tiny_unet(), SCHEDULER, tiny_task(), recipe(), tmp_path)
    other = DDPMScheduler(prediction_type="v_prediction")
    with pytest.raises(WorkdirError, match="it differs in scheduler"):
        build_experts(tiny_unet(), other, tiny_task(), recipe(), tmp_path)


def test_the_user_s_scheduler_is_not_the_one_that_works() -> None:
    assert moediff.installed().dissect(tiny_unet(), SCHEDULER).scheduler is not SCHEDULER
