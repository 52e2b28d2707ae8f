"""The papers' experiments: what they share computes what it says, and a script runs and resumes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch

import moediff
from benchmarks import budgets, cifar, paper_speed, rows, settings, tables
from benchmarks import recipes as recipes_of
from benchmarks.ladder import RUNGS
from benchmarks.scores import Channels, zeroed
from moediff import Allowance, Blueprint, Budget, ExpertMixture, Intervals, Plan, Scores
from moediff.errors import BudgetError, WorkdirError
from moediff.masking import masked
from moediff_plugins import digits
from moediff_plugins.clusterers.uniform import Uniform
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.params import Params
from moediff_plugins.pruners.structural import Structural
from moediff_plugins.scorers.taylor import Taylor

ROOT = Path(__file__).parent.parent


@pytest.fixture
def on(tmp_path: Path) -> settings.Setting:
    options = argparse.Namespace(
        on="digits", data=None, device="cpu", quick=True, runs=tmp_path, results=tmp_path
    )
    return settings.load(options, "tested")


def test_zeroed_weights_are_a_closed_mask(on: settings.Setting):
    subject = Channels.of(on).subject
    masks = (torch.rand(len(subject.anatomy.units)) > 0.3).float()
    sample, t, labels = (
        torch.randn(3, 1, 8, 8),
        torch.tensor([1, 500, 990]),
        torch.tensor([3, 8, 3]),
    )
    with torch.no_grad():
        found = zeroed(subject, masks)(sample, t, class_labels=labels).sample
        with masked(subject.denoiser, subject.anatomy, masks):
            wanted = subject.denoiser(sample, t, class_labels=labels).sample
        whole = subject.denoiser(sample, t, class_labels=labels).sample
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (found - whole).abs().max() > 0.1


def test_channels_are_removed_up_to_the_share_and_not_beyond(on: settings.Setting):
    channels = Channels.of(on)
    figures = channels.closed("magnitude", 0.1).make(0)
    dearest = float(channels.prices.units.max()) / channels.prices.full
    assert 0.1 - dearest < figures["removed"] <= 0.1
    shares = [value for key, value in figures.items() if key.startswith("layer ")]
    assert sum(shares) == pytest.approx(1)
    assert channels.intact().make(0)["removed"] == 0


def test_trained_parameters_are_those_that_are_not_the_base_models(on: settings.Setting):
    plan = Plan(Intervals.uniform(1000, 2), (Blueprint(),) * 2, {"mid_block.resnets.0": (0, 1)})
    mixture = ExpertMixture.from_experts([on.subject, on.subject], plan).untie()
    assert rows.changed(on.subject.denoiser, on) == rows.changed(mixture, on) == 0
    first, second = (expert.mid_block.resnets[0].conv1.weight for expert in mixture.experts)
    first.data += 1
    assert rows.changed(mixture, on) == first.numel()
    second.data += 1
    mixture.experts[0].conv_in.bias.data += 1  # shared, so it counts once
    assert rows.changed(mixture, on) == 2 * first.numel() + mixture.experts[0].conv_in.bias.numel()
    assert rows.measure(rows.Trained(on.subject.denoiser, on.whole), on, 0)["stored"] == 1
    assert Params().price(on.subject).full > first.numel()


def test_differences_are_paired_by_seed():
    figures = {
        "a": [{"steps": 5.0, "FD[digits]": 1.0}, {"steps": 5.0, "FD[digits]": 11.0}],
        "b": [{"steps": 9.0, "FD[digits]": 3.0}, {"steps": 9.0, "FD[digits]": 15.0}],
    }
    first, second = tables.summarise(figures, "a")
    assert first == {"model": "a", "steps": "5", "FD[digits]": "6 ± 7.1", "FD[digits] less a": ""}
    # 2 and 4: their mean has a standard error of 1, and t(0.975) is 12.7 for two of them.
    assert second["FD[digits] less a"] == "+3 [-9.7, +16]"
    lines = tables.summarise(figures, {"a": "b"})
    assert lines[0]["FD[digits] less the row it builds on"] == "-3 [-16, +9.7]"
    assert lines[1]["FD[digits] less the row it builds on"] == ""


def test_every_rung_and_every_budget_takes_as_many_optimiser_batches(on: settings.Setting):
    on = attrs.evolve(on, steps=1600)
    recipes = [recipes_of.diffpruning(on, **parts) for parts in RUNGS.values()]
    for recipe in (*recipes, recipes_of.diffpruning(on, 0.3)):
        elastic = recipe.prepare
        batches = recipe.experts * recipe.gate.steps + recipe.recover.steps
        batches += elastic.depth_steps + elastic.width_steps if elastic else 0
        assert batches == 1600
    assert budgets.by_score(on, Taylor()).recover.steps == 1600


def test_the_least_budget_is_the_next_twentieth_that_is_reached(on: settings.Setting):
    assert budgets.shares_of(on) == (0.7, 0.5, 0.3)
    colour = moediff.installed().dissect(*cifar.load_base())
    *_, least = budgets.shares_of(attrs.evolve(on, subject=colour))
    space = Structural().space(colour, Scores(torch.zeros(len(colour.anatomy.units))))

    def check(share: float) -> None:
        budget, prices = Budget(share, MACs()), MACs().price(colour)
        Allowance(budget, prices, (1,), lambda part: (0,)).check_floor([space])

    check(least)
    with pytest.raises(BudgetError):
        check(least - 0.05)


@pytest.mark.parametrize("name", ["distilled", "tuned", "pruned", "by elastic experts and masks"])
def test_batches_are_optimiser_steps_of_every_expert(on: settings.Setting, name: str):
    on = attrs.evolve(on, steps=10)
    recipe = {
        "distilled": recipes_of.moedm(on),
        "tuned": recipes_of.moedm(on, real=True),
        "pruned": attrs.evolve(recipes_of.moedm(on), recover=None),
        "by elastic experts and masks": attrs.evolve(
            recipes_of.diffpruning(on), clusterer=Uniform()
        ),
    }[name]
    made = rows.train(recipe, on, name, 0)
    assert made.batches == (0 if name == "pruned" else 10)
    assert made.images >= 10 * on.batch or name == "pruned"
    assert (rows.measure(made, on, 0)["trained"] == 0) == (name == "pruned")


@pytest.mark.parametrize("dropped", [0, 2])
def test_an_even_plan_just_meets_its_budget(on: settings.Setting, dropped: int):
    prices = MACs().price(on.subject)
    plan = paper_speed.plan_at(on.subject, prices, 0.5, dropped)
    (blueprint,) = plan.blueprints
    wider = {name: (*kept, kept[0] - 1) for name, kept in blueprint.keep.items()}
    more = Plan(plan.intervals, (Blueprint(blueprint.drop, wider),))
    shares = [one.cost(prices, on.sampling)["live"] / prices.full for one in (plan, more)]
    assert shares[0] <= 0.5 < shares[1]
    assert len(blueprint.drop) == dropped
    # One share s for all: a width of W units keeps the smallest number that is not below s W.
    counts = {name: on.subject.anatomy.widths[name].count for name in blueprint.keep}
    left = [(len(kept), counts[name]) for name, kept in blueprint.keep.items()]
    assert max((kept - 1) / count for kept, count in left) < min(k / count for k, count in left)


def test_figures_of_another_recipe_are_refused(on: settings.Setting):
    made = []

    def row(*depends: object) -> rows.Row:
        return rows.Row(lambda seed: made.append(seed) or {"x": 1.0}, depends)

    assert rows.collect({"a": row(1)}, on) == {"a": [{"x": 1.0}]}
    assert rows.collect({"a": row(1)}, on) == {"a": [{"x": 1.0}]}
    assert made == [0]
    for changed, other in (({"a": row(2)}, on), ({"a": row(1)}, attrs.evolve(on, steps=5))):
        with pytest.raises(WorkdirError, match="another recipe or size"):
            rows.collect(changed, other)
    assert made == [0]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_an_experiment_writes_its_table_and_does_not_repeat_itself(tmp_path: Path):
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    first = run("benchmarks.expansion", "--quick", *folders)
    assert first.returncode == 0, first.stderr
    written = (tmp_path / "expansion-digits.md").read_text(encoding="utf-8")
    for name in ("base, fine-tuned", "without dynamic", "uniform 2x", "uneven", "learned"):
        assert f"| {name} |" in written
    assert "`python -m benchmarks.expansion --on digits --quick`" in written
    assert str(tmp_path) not in written
    again = run("benchmarks.expansion", "--quick", *folders)
    assert "- base, seed 0" in first.stdout
    assert "seed 0" not in again.stdout
    assert (tmp_path / "expansion-digits.md").read_text(encoding="utf-8") == written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "row", "pictures"),
    [
        ("budgets", "torch-pruning, first stage kept, 50%", 6),
        ("elastic_ranks", "timesteps 500 to 999", 1),
        ("ladder", "DiffPruning, fine-tuned as long as ERA", 0),
        ("latency_budget", "50% of the time, ERA, two experts", 0),
    ],
)
def test_other_tables_have_their_rows_and_pictures(
    name: str, row: str, pictures: int, tmp_path: Path
):
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    found = run(f"benchmarks.{name}", "--quick", *folders)
    assert found.returncode == 0, found.stderr
    assert f"| {row} |" in (tmp_path / f"{name}-digits.md").read_text(encoding="utf-8")
    assert len(list(tmp_path.glob("*.png"))) == pictures


@pytest.mark.slow
def test_a_model_of_one_s_own_takes_part(on: settings.Setting, tmp_path: Path):
    base, scheduler = digits.load_base()
    base.save_pretrained(tmp_path / "model" / "unet")
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    images, labels = digits.load_images("test")
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    mine = ["--model", str(tmp_path / "model"), "--images", str(tmp_path / "images.npz")]
    found = run(
        "benchmarks.phases", "--on", "own", "--quick", "--extractor", "digits", *mine, *folders
    )
    assert found.returncode == 0, found.stderr
    written = (tmp_path / "phases-own.md").read_text(encoding="utf-8")
    assert "| two phases |" in written
    assert f"with {len(images)} real ones, which were trained on;" in written
    assert "that the base took" not in written
    assert str(tmp_path) not in written
    refused = run("benchmarks.phases", "--on", "own")
    assert refused.returncode == 2
    assert "--on own needs --model FOLDER" in refused.stderr


def test_what_is_compared_with_is_said(on: settings.Setting):
    assert "357 real ones, most of which were trained on;" in tables.describe(on)
    unseen = attrs.evolve(on, reference=on.unseen)
    assert f"{len(on.unseen)} real ones; they" in tables.describe(unseen)
    assert "after 3,500 of 128 images that the base took" in tables.describe(on)


def test_a_base_without_its_data_is_refused_in_one_line():
    found = run("benchmarks.expansion", "--on", "cifar")
    assert found.returncode == 2
    assert "--on cifar needs --data FOLDER" in found.stderr.splitlines()[-1]


def test_the_task_and_the_sizes_are_those_asked_for(on: settings.Setting):
    assert moediff.Sampling("ddim", 4) == on.sampling
    assert on.seeds == (0,)
    assert {3, 8} == set(on.task.conditioning["class_labels"].tolist())
