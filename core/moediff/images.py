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


def read_images(path: Path, size: int) -> tuple[Array, Array | list[int] | None]:
    """Images (n, H, W, C) and their labels (n,), if there are any, from a folder or an `.npz`.

    Args:
        path: see `Task.from_folder`.
        size: height and width; files are centre-cropped and resized to it.

    Raises:
        DataError: nothing readable is there, or arrays have another size.
    """
    return _from_arrays(path, size) if path.suffix == ".npz" else _from_files(path, size)


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


def _from_files(path: Path, size: int) -> tuple[Array, list[int] | None]:
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
                pixels.append(np.asarray(ImageOps.fit(image.convert("RGB"), (size, size))))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"data: cannot read {file}: {error}. Repair or remove it.") from error
    folders = [file.relative_to(path).parts[0] for file in files]
    nested = all(len(file.relative_to(path).parts) > 1 for file in files)
    names = sorted(set(folders))
    return np.stack(pixels), [names.index(folder) for folder in folders] if nested else None
