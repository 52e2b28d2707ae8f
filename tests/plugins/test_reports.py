"""The page of a run says what was built, with the run's own figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

import moediff
from moediff import Budget, Sampling
from moediff.cli import main
from moediff_plugins.clusterers.alignment import Alignment
from moediff_plugins.clusterers.loss_similarity import LossSimilarity
from moediff_plugins.clusterers.uniform import Uniform
from moediff_plugins.counters.macs import MACs
from moediff_plugins.gates.era import ERA
from moediff_plugins.reports.page import Page
from moediff_plugins.tuners.elastic import Elastic
from moediff_plugins.tuners.finetune import Finetune
from tests.conftest import tiny_task, tiny_unet

SMALL = {"batch": 2, "learning_rate": 1e-4}


def built(folder: Path, **parts: object) -> moediff.ExpertMixture:
    parts = {
        "clusterer": Uniform(),
        "prepare": None,
        "gate": ERA(steps=3, hidden=8, **SMALL),
        "recover": Finetune(4, **SMALL),
        "budget": Budget(0.6, MACs()),
        "sampling": Sampling("ddim", 4, guidance=2.0),
        **parts,
    }
    recipe = moediff.load_recipe("diffpruning", **parts)
    net = tiny_unet(num_class_embeds=4)
    return moediff.build_experts(net, DDPMScheduler(), tiny_task(labelled=True), recipe, folder)


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows]


def test_the_page_has_the_run_s_own_figures(tmp_path: Path) -> None:
    mixture = built(
        tmp_path,
        clusterer=Alignment(stride=250, images=4, batch=2),
        prepare=Elastic(2, 2, subnets=0, **SMALL),
    )
    page = Page(samples=3).write(tmp_path).read_text(encoding="utf-8")
    found = {row[0]: row for row in cells(page) if row}
    low, high = mixture.intervals[1]
    assert found["expert 1"][1] == f"{low} to {high - 1}"
    size = sum(p.numel() for p in mixture.experts[1].parameters()) / 1e6
    assert found["expert 1"][3] == f"{size:.2f} M"
    assert sum(int(found[f"expert {i}"][5]) for i in (0, 1)) == 2 * 4  # guidance calls twice
    assert found["recover"][1:3] == ["8", "4"]
    assert "budget 0.6 of the base" in page
    assert "Before binarisation" in page
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "What it took", "Samples", "Alignment of timesteps", "What the experts keep", "Training",
    ]  # fmt: skip
    assert 'src="http' not in page


def test_samples_are_of_the_task_s_classes(tmp_path: Path) -> None:
    recipe = moediff.load_recipe(
        "diffpruning", clusterer=LossSimilarity(stride=250, images=4, batch=2), prepare=None,
        gate=ERA(steps=3, hidden=8, **SMALL), recover=None, budget=Budget(0.6, MACs()),
        sampling=Sampling("ddim", 4),
    )  # fmt: skip
    task = tiny_task(labelled=True)
    rows = torch.isin(task.conditioning["class_labels"], torch.tensor([1, 3]))
    labels = task.conditioning["class_labels"][rows]
    some = moediff.Task(task.samples[rows], {"class_labels": labels})
    moediff.build_experts(tiny_unet(num_class_embeds=4), DDPMScheduler(), some, recipe, tmp_path)
    page = Page(samples=4).write(tmp_path).read_text(encoding="utf-8")
    assert "The task&#39;s classes in turn: 1, 3." in page
    assert "Similarity of timesteps&#39; losses" in page


def test_a_page_of_labels_that_are_no_class_numbers_has_no_samples(tmp_path: Path) -> None:
    recipe = moediff.load_recipe(
        "diffpruning", clusterer=Uniform(), prepare=None, gate=ERA(steps=3, hidden=8, **SMALL),
        recover=None, budget=Budget(0.6, MACs()), sampling=Sampling("ddim", 4),
    )  # fmt: skip
    task = tiny_task()
    floats = moediff.Task(task.samples, {"class_labels": torch.linspace(0, 1, len(task))})
    net = tiny_unet(class_embed_type="timestep")
    moediff.build_experts(net, DDPMScheduler(), floats, recipe, tmp_path)
    page = Page(samples=4).write(tmp_path).read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == ["What it took", "What the experts keep", "Training"]


def test_a_page_shows_only_what_there_is(tmp_path: Path) -> None:
    built(tmp_path, recover=None)
    page = Page(samples=0).write(tmp_path).read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == ["What it took", "What the experts keep", "Training"]


def test_a_folder_without_a_finished_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'report.html'}\n"
    assert "<h2>Samples</h2>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(tmp_path), "--kind", "pages"]) == 2
    assert "Did you mean 'page'" in capsys.readouterr().err
