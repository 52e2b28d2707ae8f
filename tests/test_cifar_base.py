"""The colour base: its training goes on after a kill, its export loads, its data is labelled."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

import moediff
from benchmarks import cifar
from examples.train_cifar_base import NULL_LABEL, load_cifar
from moediff.errors import DataError, UnknownNameError
from moediff.storage import read_packed

ROOT = Path(__file__).parent.parent
LAST = 30


def pack(images: np.ndarray, labels: Sequence[int], split: str) -> dict[str, np.ndarray]:
    """Images (n, 32, 32, 3) as JPEG bytes end to end, as cifar10_jpeg.npz holds them."""
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="jpeg", quality=95)
        files.append(buffer.getvalue())
    return {
        f"{split}_jpeg": np.frombuffer(b"".join(files), dtype=np.uint8),
        f"{split}_offsets": np.cumsum([0, *map(len, files)]),
        f"{split}_labels": np.asarray(labels),
    }


def flat(count: int) -> np.ndarray:
    """Images (n, 32, 32, 3) of one shade each, by which they can be told apart."""
    shades = (np.arange(count) * 8).astype(np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (count, 32, 32, 3)).copy()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 20 images to train on, 10 to test with, and 12 pets."""
    folder = tmp_path_factory.mktemp("data")
    train = pack(flat(20), [k % 10 for k in range(20)], "train")
    test = pack(flat(10), range(10), "test")
    classes = np.array(cifar.CLASSES)
    np.savez(folder / "cifar10_jpeg.npz", classes=classes, **train, **test)
    pets = {"images": flat(12), "labels": np.arange(12) % 2, "classes": np.array(["cat", "dog"])}
    np.savez(folder / "pets32.npz", **pets)
    return folder


def start(data: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "examples/train_cifar_base.py", "--data", str(data)]
    command += ["--out", str(out), "--widths", "8", "16", "--batch", "4", "--eval-every", "2"]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    finish(start(data, out, "--steps", str(LAST)))
    return out


def comparable(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """A checkpoint without the seconds that it took."""
    tensors, content = read_packed(out / "last.safetensors")
    log = [{k: v for k, v in row.items() if k != "seconds"} for row in content["log"]]
    return tensors, {"step": content["step"], "losses": content["losses"], "log": log}


@pytest.mark.slow
def test_training_goes_on_after_a_kill_as_if_nothing_had_happened(data, uninterrupted, tmp_path):
    killed = start(data, tmp_path, "--steps", "1000000")
    deadline = time.monotonic() + 60
    while not (tmp_path / "last.safetensors").exists():
        assert killed.poll() is None, killed.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    reached = comparable(tmp_path)[1]["step"]
    assert 0 < reached < LAST

    finish(start(data, tmp_path, "--steps", str(LAST)))
    tensors, content = comparable(tmp_path)
    wanted, expected = comparable(uninterrupted)
    assert content == expected
    assert content["step"] == LAST
    assert len(content["log"]) == LAST // 2
    assert tensors.keys() == wanted.keys()
    assert {name.split(".")[0] for name in tensors} == {"model", "average", "optimiser"}
    assert [name for name, value in wanted.items() if not torch.equal(tensors[name], value)] == []


@pytest.mark.slow
def test_the_export_is_half_a_pipeline_that_moediff_takes(data, uninterrupted, tmp_path):
    before = (uninterrupted / "last.safetensors").read_bytes()
    ask = ("--finish", "4", "--export", str(tmp_path))
    finish(start(data, uninterrupted, *ask, "--hours", "0"))
    assert not list(tmp_path.iterdir())  # the rate has not fallen yet
    finish(start(data, uninterrupted, *ask))
    # The training at a constant rate can go on.
    assert (uninterrupted / "last.safetensors").read_bytes() == before
    assert not (uninterrupted / "finishing.safetensors").exists()

    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"unet", "scheduler", "card.json", "samples.png", "training_log.jsonl"}
    stored = UNet2DModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float16)
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.float16}
    DDPMScheduler.from_pretrained(tmp_path / "scheduler")

    denoiser, scheduler = cifar.load_base(tmp_path)
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float32}
    assert not denoiser.training
    assert torch.equal(denoiser.conv_in.weight, stored.conv_in.weight.float())
    subject = moediff.installed().dissect(denoiser, scheduler)
    assert subject.total == 1000
    task = cifar.load_images(data, "train")
    task.check(subject.shape, conditioned=True)
    labels = torch.tensor([0, NULL_LABEL])
    with torch.no_grad():
        noise = denoiser(torch.zeros(2, 3, 32, 32), 500, class_labels=labels).sample
    assert noise.isfinite().all()
    assert not torch.equal(noise[0], noise[1])


def test_jpegs_are_decoded_in_order_with_their_labels(data):
    images, labels = load_cifar(data, "train")
    assert (images.shape, images.dtype) == ((20, 3, 32, 32), torch.uint8)
    assert labels.tolist() == [k % 10 for k in range(20)]
    assert torch.allclose(images.float().mean(dim=(1, 2, 3)), torch.arange(20) * 8.0, atol=1)


def test_a_task_of_some_classes_keeps_cifars_labels(data):
    store = cifar.load_images(data, "train", cifar.PETS)
    assert store.conditioning["class_labels"].tolist() == [3, 5, 3, 5]
    assert store.null["class_labels"].tolist() == [NULL_LABEL]
    shades = (store.samples.mean(dim=(1, 2, 3)) + 1) * 127.5
    assert torch.allclose(shades, torch.tensor([3, 5, 13, 15]) * 8.0, atol=1)
    assert len(cifar.load_images(data, "test")) == 10
    with pytest.raises(UnknownNameError, match="Did you mean 'dog'"):
        cifar.load_images(data, "train", ["dogs"])


def test_pets_have_the_labels_of_cifars_cats_and_dogs(data):
    pets = cifar.load_pets(data)
    assert pets.conditioning["class_labels"].tolist() == [3, 5] * 6
    assert pets.null["class_labels"].tolist() == [NULL_LABEL]
    assert pets.samples.shape == (12, 3, 32, 32)
    train, test = cifar.load_pets(data, "train"), cifar.load_pets(data, "test")
    assert (len(train), len(test)) == (10, 2)
    both = torch.cat([train.samples, test.samples]).mean(dim=(1, 2, 3))
    assert torch.equal(both.sort().values, pets.samples.mean(dim=(1, 2, 3)).sort().values)


def test_other_classes_are_refused(data, tmp_path):
    with np.load(data / "cifar10_jpeg.npz") as file:
        content = dict(file)
    np.savez(tmp_path / "cifar10_jpeg.npz", **content | {"classes": content["classes"][::-1]})
    with pytest.raises(DataError, match="in this order"):
        cifar.load_images(tmp_path, "test")
    with np.load(data / "pets32.npz") as file:
        content = dict(file)
    np.savez(tmp_path / "pets32.npz", **content | {"classes": np.array(["cat", "hamster"])})
    with pytest.raises(DataError, match="hamster"):
        cifar.load_pets(tmp_path)


def test_a_base_that_is_not_there_is_asked_for(tmp_path):
    with pytest.raises(DataError, match="train_cifar_base"):
        cifar.load_base(tmp_path)
