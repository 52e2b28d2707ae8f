"""Images as users have them, in arrays, folders and files, checked and made into tensors."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from moediff.errors import DataError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"}

Array = np.ndarray[Any, Any]


def image_samples(images: Array) -> torch.Tensor:
    """Samples (n, C, H, W) in [-1, 1] from images (n, H, W, C), uint8 or float in [-1, 1].

    Raises:
        DataError: the shape, type or range is another one, or a value is NaN.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or not len(images):
        raise DataError(
            f"images: got shape {images.shape}; allowed is (n, H, W, C) with n of at least 1 "
            "and C of 1, 3 or 4. Move the channel axis last, or add one."
        )
    if images.dtype == np.uint8:
        samples = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)
    elif images.dtype.kind == "f":
        samples = torch.from_numpy(images.astype(np.float32))
        if not torch.isfinite(samples).all():
            raise DataError("images: got NaN or infinite values; remove or repair those images.")
        low, high = float(samples.min()), float(samples.max())
        if low < -1 - 1e-4 or high > 1 + 1e-4:
            raise DataError(
                f"images: got floats from {low:.4g} to {high:.4g}; allowed is [-1, 1]. "
                "Rescale them, or pass uint8."
            )
    else:
        raise DataError(f"images: got dtype {images.dtype}; allowed are uint8 and floats.")
    return samples.permute(0, 3, 1, 2).contiguous()


def class_numbers(labels: Array | Sequence[int], count: int) -> torch.Tensor:
    """Labels (n,) as integers.

    Raises:
        DataError: they are not `count` integers.
    """
    array = np.asarray(labels)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise DataError(
            f"labels: got shape {array.shape} of {array.dtype}; allowed are {count} integers, one "
            "per image."
        )
    return torch.from_numpy(array.astype(np.int64))


def read_images(path: Path, size: int, channels: int) -> tuple[Array, Array | Sequence[int] | None]:
    """Images (n, H, W, C) and their labels (n,), if there are any, from a folder or an `.npz`.

    Args:
        path: see `Task.from_folder`.
        size: height and width; files are centre-cropped and resized to it.
        channels: C of files, which are brought to it: 1 for grey, 3 for RGB.

    Raises:
        DataError: nothing readable is there, or arrays have another size.
    """
    if path.suffix == ".npz":
        return _from_arrays(path, size)
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise DataError(
            f"channels: got {channels}; allowed of image files are 1 and 3. Give an .npz file."
        )
    return _from_files(path, size, modes[channels])


def _from_arrays(path: Path, size: int) -> tuple[Array, Array | None]:
    try:
        # np.load leaves a path open if the file turns out to be broken.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            images = arrays["images"]
            labels = arrays.get("labels", None)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"data: cannot read {path}: {error}. Give an .npz file that holds `images` "
            "(n, H, W, C) and `labels` (n,)."
        ) from error
    if images.ndim == 4 and images.shape[1:3] != (size, size):
        raise DataError(
            f"images: got {images.shape[1]}x{images.shape[2]} pixels; allowed is "
            f"{size}x{size}. Resize them or pass size={images.shape[1]}."
        )
    return images, labels


def _from_files(path: Path, size: int, mode: str) -> tuple[Array, list[int] | None]:
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(
            f"data: found no images under {path}. Give a folder of "
            f"{', '.join(sorted(SUFFIXES))} files, one sub-folder per class or flat."
        )
    pixels = []
    for file in files:
        try:
            with Image.open(file) as image:
                fitted = np.asarray(ImageOps.fit(image.convert(mode), (size, size)))
                pixels.append(fitted.reshape(size, size, -1))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"data: cannot read {file}: {error}. Repair or remove it.") from error
    nested = all(len(file.relative_to(path).parts) > 1 for file in files)
    folders = [file.relative_to(path).parts[0] for file in files]
    return np.stack(pixels), _classes(folders) if nested else None


def _classes(folders: Sequence[str]) -> list[int]:
    """Class numbers of folder names: the numbers that they are, or their places in the alphabet."""
    names = sorted(set(folders))
    if all(name.isdecimal() for name in names):
        return [int(folder) for folder in folders]
    return [names.index(folder) for folder in folders]
