"""Images in arrays, folders and files: everything that a stranger may hand over wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moediff import Task
from moediff.errors import DataError

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def test_bytes_become_floats_in_the_right_range_and_order() -> None:
    samples = Task.from_arrays(BYTES).samples
    assert samples.shape == (6, 3, 8, 8)
    assert samples.dtype == torch.float32
    wanted = torch.from_numpy(BYTES).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(samples, wanted)
    assert Task.from_arrays(np.full((1, 2, 2, 1), 255, np.uint8)).samples.unique().tolist() == [1.0]
    assert Task.from_arrays(np.zeros((1, 2, 2, 1), np.uint8)).samples.unique().tolist() == [-1.0]


def test_floats_pass_as_they_are() -> None:
    images = RNG.uniform(-1, 1, (4, 8, 8, 1))
    task = Task.from_arrays(images)
    torch.testing.assert_close(
        task.samples, torch.from_numpy(images).permute(0, 3, 1, 2).float(), rtol=0, atol=1e-7
    )
    assert len(task) == 4


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), r"got shape \(8, 8, 3\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), "Move the channel axis last"),
        (np.zeros((0, 8, 8, 3), np.uint8), "n of at least 1"),
        (np.zeros((1, 8, 8, 3)) + 1.5, r"floats from 1.5 to 1.5; allowed is \[-1, 1\]"),
        (np.full((1, 8, 8, 3), -2.0), "Rescale them, or pass uint8"),
        (np.full((1, 8, 8, 3), np.nan), "NaN or infinite"),
        (np.full((1, 8, 8, 3), np.inf), "NaN or infinite"),
        (np.zeros((1, 8, 8, 3), np.int64), "got dtype int64; allowed are uint8 and floats"),
        (np.zeros((1, 8, 8, 3), bool), "got dtype bool"),
    ],
)
def test_other_images_are_refused(images: np.ndarray[Any, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Task.from_arrays(images)


@pytest.mark.parametrize(
    "labels", [[0, 1], [[0]] * 6, [0.0] * 6, ["a"] * 6], ids=["short", "2-d", "floats", "words"]
)
def test_other_labels_are_refused(labels: Any) -> None:
    with pytest.raises(DataError, match="allowed are 6 integers, one per image"):
        Task.from_arrays(BYTES, labels)


def save(path: Path, pixels: np.ndarray[Any, Any] = BYTES[0]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_a_flat_folder(tmp_path: Path) -> None:
    for index in (1, 0):
        save(tmp_path / f"{index}.png", BYTES[index])
    (tmp_path / "notes.txt").write_text("not an image")
    task = Task.from_folder(tmp_path, size=8)
    assert torch.equal(task.samples, Task.from_arrays(BYTES[:2]).samples)
    assert task.conditioning == {}


def test_a_folder_per_class(tmp_path: Path) -> None:
    for name, index in (("dog", 0), ("cat", 1), ("dog", 2)):
        save(tmp_path / name / f"{index}.png", BYTES[index])
    task = Task.from_folder(tmp_path, size=8, null_label=2)
    assert task.conditioning["class_labels"].tolist() == [0, 1, 1]  # cat is 0, dog is 1
    assert torch.equal(task.samples, Task.from_arrays(BYTES[[1, 0, 2]]).samples)
    assert task.null["class_labels"].tolist() == [2]


def test_images_are_cropped_and_resized_and_become_rgb(tmp_path: Path) -> None:
    save(tmp_path / "wide.png", np.full((10, 30), 255, np.uint8))
    assert Task.from_folder(tmp_path, size=16).samples.shape == (1, 3, 16, 16)


def test_an_npz_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=BYTES, labels=np.arange(6))
    task = Task.from_folder(tmp_path / "a.npz", size=8)
    assert torch.equal(task.samples, Task.from_arrays(BYTES).samples)
    assert task.conditioning["class_labels"].tolist() == list(range(6))
    np.savez(tmp_path / "b.npz", images=BYTES)
    assert Task.from_folder(tmp_path / "b.npz", size=8).conditioning == {}
    with pytest.raises(DataError, match="got 8x8 pixels; allowed is 32x32"):
        Task.from_folder(tmp_path / "b.npz")


def test_an_npz_file_that_is_not_what_it_says(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", pictures=BYTES)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a zip file")
    np.savez(tmp_path / "pickled.npz", images=np.array([{}], dtype=object))
    for name in ("other", "broken", "pickled", "missing"):
        with pytest.raises(DataError, match=rf"data: cannot read .*{name}\.npz"):
            Task.from_folder(tmp_path / f"{name}.npz", size=8)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"cannot read .*b\.png"):
        Task.from_folder(tmp_path, size=8)
    (tmp_path / "b.png").write_bytes(b"no image at all")
    with pytest.raises(DataError, match=r"cannot read .*b\.png"):
        Task.from_folder(tmp_path, size=8)


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_folder_without_images_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found no images"):
        Task.from_folder(tmp_path / name)


def test_folders_that_are_numbers_are_those_classes(tmp_path: Path) -> None:
    for name, index in (("10", 0), ("8", 1), ("3", 2)):
        save(tmp_path / name / f"{index}.png", BYTES[index])
    task = Task.from_folder(tmp_path, size=8)
    assert sorted(task.conditioning["class_labels"].tolist()) == [3, 8, 10]
    assert torch.equal(task.subset([8]).samples, Task.from_arrays(BYTES[[1]]).samples)


def test_images_become_grey_for_a_denoiser_of_one_channel(tmp_path: Path) -> None:
    save(tmp_path / "grey.png", BYTES[0, :, :, 0])
    save(tmp_path / "rgb.png", BYTES[1])
    task = Task.from_folder(tmp_path, size=8, channels=1)
    assert task.samples.shape == (2, 1, 8, 8)
    assert torch.equal(task.samples[:1], Task.from_arrays(BYTES[:1, :, :, :1]).samples)
    with pytest.raises(DataError, match="channels: got 4; allowed of image files are 1 and 3"):
        Task.from_folder(tmp_path, size=8, channels=4)


def test_a_null_label_needs_labels() -> None:
    with pytest.raises(DataError, match="null_label: got 3 without labels"):
        Task.from_arrays(BYTES, null_label=3)
