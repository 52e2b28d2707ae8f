"""The command line: real files, real processes' exit codes, one clear line for bad input."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler
from PIL import Image

import moediff
from moediff.cli import main
from moediff.modelfile import load_model
from tests.conftest import tiny_unet

CONFIGS = Path(__file__).parent / "data" / "configs"

RECIPE = """
experts = 2

[model]
path = "{model}"

[task]
path = "{data}"
size = 8

[scorer]
name = "magnitude"

[clusterer]
name = "uniform"

[gate]
name = "one-hot"

[pruner]
name = "structural"

[budget]
value = 0.6
counter = "macs"

[sampling]
steps = 4
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe file beside a saved pipeline and data."""
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "model")
    schedule = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config = json.loads(schedule.read_text())  # old ones lack what diffusers has learned since
    for name in ("clip_sample_range", "rescale_betas_zero_snr", "steps_offset", "thresholding"):
        del config[name]
    schedule.write_text(json.dumps(config))
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(model=tmp_path / "model", data=tmp_path / "data.npz"))
    return path


def test_a_run_that_was_killed_goes_on_and_ends_bit_equal(recipe: Path, tmp_path: Path) -> None:
    training = '[recover]\nname = "finetune"\nsteps = 40\nbatch = 4\nsave_every = 5\n'
    recipe.write_text(recipe.read_text() + training)
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def command(out: Path, *more: str) -> list[str]:
        words = ["run", str(recipe), "--out", str(out), "--quiet", *more]
        return [
            sys.executable,
            "-c",
            "from moediff.cli import main; raise SystemExit(main())",
            *words,
        ]

    subprocess.run(command(whole), check=True)
    with subprocess.Popen(command(killed)) as process:
        while process.poll() is None and not list(killed.glob("stages/*.checkpoint")):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL  # else it was over before it could be killed
    assert not (killed / "mixture").exists()

    subprocess.run(command(killed, "--resume"), check=True)
    one, other = (moediff.ExpertMixture.from_pretrained(f / "mixture") for f in (whole, killed))
    assert one.plan == other.plan
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert not list(killed.glob("**/*.checkpoint")) + list(killed.glob("**/*.partial"))
    before = {file.name for file in (killed / "stages").iterdir()}
    subprocess.run(command(killed, "--resume"), check=True)  # finds every stage again
    assert {file.name for file in (killed / "stages").iterdir()} == before


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail with one line on stderr and exit code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("moediff: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


def test_run_builds_a_mixture_that_loads(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["run", str(recipe), "--out", str(out), "--quiet"]) == 0
    mixture = moediff.ExpertMixture.from_pretrained(out / "mixture")
    assert len(mixture.experts) == 2
    assert json.loads((out / "plan.json").read_text())["cuts"] == [0, 500, 1000]
    assert "--resume" in refused(capsys, "run", recipe, "--out", out, "--quiet")
    assert main(["run", str(recipe), "--out", str(out), "--quiet", "--resume"]) == 0


def test_a_folder_of_another_run_is_refused_and_left_alone(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["run", str(recipe), "--out", str(out), "--quiet"]) == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    recipe.write_text(recipe.read_text().replace("value = 0.6", "value = 0.5"))
    message = refused(capsys, "run", recipe, "--out", out, "--quiet", "--resume")
    assert "another run" in message
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")) == before


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "magnitude"', 'name = "magnitud"', "Did you mean 'magnitude'?"),
        ('name = "magnitude"', 'name = "magnitude"\npower = 2', "unknown option 'power'"),
        ('name = "magnitude"', 'name = "magnitude"\np = -1', "p"),
        ("value = 0.6", "value = 1.5", "got 1.5"),
        ("value = 0.6", "value = 0", "got 0"),
        ("value = 0.6", "value = 0.001", "the floor"),
        ("experts = 2", "experts = 2000", "1 to 1000"),
        ("experts = 2", "expert = 2", "Did you mean 'experts'?"),
        ("size = 8", "size = 16", "16x16"),
        ("steps = 4", "steps = 4000", "1 to 1000"),
        ("[model]", "[model", "not valid TOML"),
    ],
)
def test_bad_recipes_are_one_line_and_leave_nothing(recipe, tmp_path, capsys, old, new, says):
    recipe.write_text(recipe.read_text().replace(old, new, 1))
    out = tmp_path / "out"
    assert says in refused(capsys, "run", recipe, "--out", out, "--quiet")
    assert not (out / "mixture").exists()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((4, 8, 8), np.uint8), "shape"),
        (np.zeros((4, 8, 8, 1), np.uint8), "denoiser takes"),
        (np.full((4, 8, 8, 3), 7.0), "[-1, 1]"),
        (np.full((4, 8, 8, 3), np.nan), "NaN"),
        (np.zeros((4, 8, 8, 3), np.int32), "dtype"),
    ],
)
def test_bad_images_are_one_line(recipe, tmp_path, capsys, images, says):
    np.savez(tmp_path / "data.npz", images=images)
    assert says in refused(capsys, "run", recipe, "--out", tmp_path / "out", "--quiet")
    assert not (tmp_path / "out").exists()


def test_a_pipeline_saved_with_its_sampler_is_trained_with_its_schedule(recipe, tmp_path):
    EulerDiscreteScheduler(beta_start=0.0002).save_pretrained(tmp_path / "model" / "scheduler")
    _, scheduler = load_model(tmp_path / "model")
    assert type(scheduler) is DDPMScheduler
    assert scheduler.config.beta_start == 0.0002
    assert main(["run", str(recipe), "--out", str(tmp_path / "out"), "--quiet"]) == 0


def test_a_grey_model_takes_a_folder_of_images(recipe, tmp_path):
    grey = tiny_unet(in_channels=1, out_channels=1)
    DDPMPipeline(grey, DDPMScheduler()).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((9, 9, 3), 200, np.uint8)).save(tmp_path / "images" / "a.png")
    data, images = str(tmp_path / "data.npz"), str(tmp_path / "images")
    recipe.write_text(recipe.read_text().replace(data, images).replace("size = 8\n", ""))
    assert main(["run", str(recipe), "--out", str(tmp_path / "out"), "--quiet"]) == 0


@pytest.mark.parametrize("device", ["nonsense", "cuda"])
def test_a_device_that_is_not_there_is_one_line(recipe, tmp_path, capsys, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    out = tmp_path / "out"
    assert "device: got" in refused(
        capsys, "run", recipe, "--out", out, "--quiet", "--device", device
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("size = 8", 'size = "8"', r"task.size: got '8'; allowed is an integer"),
        ("size = 8", "classes = 3", "task.classes: got 3; allowed is a list of integers"),
        ("size = 8", 'classes = ["a"]', r"task.classes: got \['a'\]"),
        ("size = 8", 'null_label = "a"', "task.null_label: got 'a'"),
        ("size = 8", "size = true", "task.size: got True"),
        ('path = "', 'path = 3 # "', "path: got 3; allowed is a string"),
    ],
)
def test_values_of_another_type_are_one_line(recipe, tmp_path, capsys, old, new, says):
    recipe.write_text(recipe.read_text().replace(old, new))
    assert re.search(says, refused(capsys, "run", recipe, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_recipe_s_name_is_no_recipe_file(tmp_path, capsys):
    says = refused(capsys, "run", "moedm", "--out", tmp_path / "out")
    assert 'Write one with base = "moedm"' in says


def test_a_model_that_is_no_denoiser_is_refused(recipe, tmp_path, capsys):
    path = tmp_path / "model" / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_class_name": "DDPMScheduler"}))
    assert "model" in refused(capsys, "run", recipe, "--out", tmp_path / "out", "--quiet")


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("ddpm-cifar10", 35.75e6, 6.22e9),
        ("ddpm-256", 113.67e6, 248.5e9),
        ("ldm-bedroom", 274.06e6, 101.2e9),
        ("ldm-church", 294.97e6, 20.92e9),
    ],
)
def test_count_reproduces_the_papers_models(capsys, name, params, macs):
    assert main(["count", str(CONFIGS / f"{name}.json"), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert set(counted) == {"params", "macs", "unit", "by_operator"}
    assert counted["unit"] == "MACs"
    assert counted["params"] == pytest.approx(params, rel=0.005)
    assert counted["macs"] == pytest.approx(macs, rel=0.005)
    assert sum(counted["by_operator"].values()) == counted["macs"]


def test_count_takes_a_pipeline_folder_and_prints_for_people(recipe, tmp_path, capsys):
    assert main(["count", str(tmp_path / "model")]) == 0
    assert "MACs" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "{}", '{"_class_name": "Nothing"}', "[]"])
def test_count_refuses_what_is_no_config(tmp_path, capsys, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    assert "model" in refused(capsys, "count", path)
    assert "No such file" in refused(capsys, "count", tmp_path / "missing.json")


def test_plugins_lists_every_strategy_and_its_distribution(capsys):
    assert main(["plugins", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"hook": "gates", "name": "era", "distribution": "moediff"} in listed["strategies"]
    assert listed["left_out"] == {}
    assert main(["plugins"]) == 0
    assert "one-hot" in capsys.readouterr().out
