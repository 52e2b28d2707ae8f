"""The data that the user cares about: clean samples and their conditioning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch

from moediff.errors import DataError, OptionError
from moediff.images import class_numbers, image_samples, read_images
from moediff.sampling import Conditioning


@attrs.frozen(eq=False)
class Batch:
    """B clean samples (B, C, H, W) with their conditioning, each tensor of B rows."""

    clean: torch.Tensor
    conditioning: Conditioning


@attrs.frozen(eq=False)
class Task:
    """Clean samples with their conditioning, and how batches and prompts are drawn from them.

    Attributes:
        samples: (n, C, H, W) floats, images in [-1, 1] or latents.
        conditioning: keyword -> tensor with n rows, for example `class_labels` (n,).
        null: keyword -> one row, the unconditional counterpart for classifier-free guidance.
        drop_conditioning: share of training rows whose conditioning is replaced by `null`.
        held_out: keyword -> m rows, the prompts that are sampled but not trained on; the keywords
            are those of `conditioning`, whose own rows are sampled where this is empty.
        extra: other samples, with the same keywords, that fill a part of every training batch
            (MoEDM Sec. 3.2, "Distillation": high-quality images of other classes).
        extra_share: that part, at least 0 and under 1; 3/8 in the paper.

    Raises:
        OptionError: `extra_share` without `extra`, or the reverse.
    """

    samples: torch.Tensor
    conditioning: Conditioning = attrs.field(factory=dict)
    null: Conditioning = attrs.field(factory=dict)
    drop_conditioning: float = attrs.field(
        default=0.1, validator=[attrs.validators.ge(0), attrs.validators.lt(1)]
    )
    held_out: Conditioning = attrs.field(factory=dict)
    extra: Task | None = None
    extra_share: float = attrs.field(
        default=0.0, validator=[attrs.validators.ge(0), attrs.validators.lt(1)]
    )

    def __attrs_post_init__(self) -> None:
        if (self.extra is None) != (self.extra_share == 0):
            raise OptionError(
                f"extra_share: got {self.extra_share} "
                f"{'without' if self.extra is None else 'with'} an `extra` task. Give both, the "
                "share above 0, or neither."
            )

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray[Any, Any],
        labels: np.ndarray[Any, Any] | Sequence[int] | None = None,
        null_label: int | None = None,
    ) -> Task:
        """Build a task from images (n, H, W, C), uint8 or float in [-1, 1], and labels (n,).

        Args:
            images: the clean images.
            labels: class numbers, for a class-conditional denoiser.
            null_label: the class that the denoiser was trained to read as "no class".

        Raises:
            DataError: the shape, type or range is another one, or a value is NaN.
        """
        samples = image_samples(images)
        conditioning: dict[str, torch.Tensor] = {}
        if labels is not None:
            conditioning["class_labels"] = class_numbers(labels, len(samples))
        null: dict[str, torch.Tensor] = {}
        if null_label is not None:
            if labels is None:
                raise DataError(
                    f"null_label: got {null_label} without labels. Give the images' labels, or "
                    "leave it out."
                )
            null["class_labels"] = torch.tensor([null_label])
        return cls(samples, conditioning, null)

    @classmethod
    def from_folder(
        cls, path: str | Path, size: int = 32, null_label: int | None = None, channels: int = 3
    ) -> Task:
        """Read images, centre-cropped and resized to `size` pixels.

        Args:
            path: a folder with one sub-folder per class, a flat folder of images, or an `.npz`
                file that holds `images` and, if there are any, `labels`. Folders that are all
                named by numbers are those classes (`3`, `8`); others are numbered by alphabet.
            size: height and width of the samples; the arrays of an `.npz` must have it already.
            null_label: see `from_arrays`.
            channels: C of the samples, 1 for grey and 3 for RGB; an `.npz` has its own.

        Raises:
            DataError: nothing readable is there.
        """
        return cls.from_arrays(*read_images(Path(path), size, channels), null_label)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def classes(self) -> list[int]:
        """The class numbers of its labels, from the lowest; none where labels are no numbers."""
        labels = self.conditioning.get("class_labels")
        if labels is None or labels.ndim != 1 or labels.is_floating_point():
            return []
        found: set[int] = set(labels.tolist())
        return sorted(found)

    def subset(self, classes: Iterable[int]) -> Task:
        """The part of this task whose class labels are among `classes`; `extra` stays whole."""
        wanted = sorted(set(classes))
        if "class_labels" not in self.conditioning:
            raise DataError(
                "classes: this task has no labels. Give labels, or do not select classes."
            )
        labels = self.conditioning["class_labels"]
        if not wanted or not set(wanted) <= set(self.classes):
            raise DataError(
                f"classes: got {wanted}; allowed are {self.classes}, the classes of this task."
            )
        rows = torch.isin(labels, torch.tensor(wanted))
        chosen, held_out = _take(self.conditioning, rows), self.held_out
        if "class_labels" in held_out:  # where no row is left, `check` says so
            held_out = _take(held_out, torch.isin(held_out["class_labels"], torch.tensor(wanted)))
        return attrs.evolve(
            self, samples=self.samples[rows], conditioning=chosen, held_out=held_out
        )

    def batch(
        self, size: int, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Batch:
        """Draw `size` rows with replacement, some with their conditioning dropped.

        The last round(size * extra_share) rows are those of `extra`, drawn by its own rules.
        """
        others = round(size * self.extra_share)
        own = size - others
        rows = torch.randint(len(self), (own,), generator=generator)
        conditioning = _take(self.conditioning, rows)
        if self.null:
            dropped = torch.rand(own, generator=generator) < self.drop_conditioning
            for name, value in self.null.items():
                shape = (-1, *([1] * (conditioning[name].ndim - 1)))
                conditioning[name] = torch.where(dropped.view(shape), value, conditioning[name])
        clean = self.samples[rows]
        if self.extra is not None and others:
            more = self.extra.batch(others, generator)
            clean = torch.cat([clean, more.clean])
            conditioning = {
                name: torch.cat([v, more.conditioning[name]]) for name, v in conditioning.items()
            }
        return Batch(clean.to(device), {k: v.to(device) for k, v in conditioning.items()})

    def prompts(
        self, count: int, device: torch.device | str = "cpu", *, training: bool = False
    ) -> tuple[Conditioning, Conditioning]:
        """Conditioning of `count` images to generate, spread evenly over the rows; its null.

        Args:
            count: how many; rows repeat where there are fewer.
            device: where to.
            training: whether the images are to be trained on. Those that are scored or measured
                are asked for with the `held_out` rows, if there are any.
        """
        source = self.conditioning if training or not self.held_out else self.held_out
        total = len(next(iter(source.values()))) if source else len(self)
        rows = torch.arange(count) * total // max(count, 1) % total
        labels = source.get("class_labels")
        if labels is not None and labels.ndim == 1:
            order = torch.argsort(labels, stable=True)
            rows = order[rows]
        chosen = {name: value.to(device) for name, value in _take(source, rows).items()}
        null = {
            name: value.expand(count, *value.shape[1:]).to(device)
            for name, value in self.null.items()
        }
        return chosen, null

    def check(
        self, shape: tuple[int, int, int], conditioned: bool, classes: int | None = None
    ) -> None:
        """Raise `DataError` unless the samples fit a denoiser that takes `shape` (C, H, W).

        So must those of `extra`, and the keywords of `extra` and `held_out` must be this task's.

        Args:
            shape: of the denoiser's samples.
            conditioned: whether it takes class labels.
            classes: how many it knows, the null label included; None where it does not say.
        """
        rows = (self.conditioning, self.null, self.held_out)
        tensors = [self.samples, *(value for part in rows for value in part.values())]
        places = sorted({str(tensor.device) for tensor in tensors})
        if places != ["cpu"]:
            raise DataError(
                f"task: got tensors on {', '.join(places)}; allowed is cpu, from which batches go "
                "to the denoiser. Call `.cpu()` on them."
            )
        if tuple(self.samples.shape[1:]) != shape:
            raise DataError(
                f"images: got samples of shape {tuple(self.samples.shape[1:])}; the denoiser takes "
                f"{shape}. Read them with that size and number of channels."
            )
        if conditioned != ("class_labels" in self.conditioning):
            raise DataError(
                "labels: the denoiser is class-conditional and the task has no labels. Pass labels."
                if conditioned
                else "labels: the denoiser takes no class labels. Leave the labels out."
            )
        if classes is not None:
            self._check_labels(classes)
        wanted = _shapes(self.conditioning)
        others = {"held_out": self.held_out} if self.held_out else {}
        if self.extra is not None:
            self.extra.check(shape, conditioned, classes)
            others["extra"] = self.extra.conditioning
        for part, words in others.items():
            if _shapes(words) != wanted:
                raise DataError(
                    f"{part}: got rows of shape {_shapes(words)}; those of the task have {wanted}. "
                    "Give it the task's keywords, with rows of the same shape."
                )
        counts = {name: len(value) for name, value in self.held_out.items()}
        if counts and (len(set(counts.values())) > 1 or 0 in counts.values()):
            raise DataError(
                f"held_out: got {counts} rows; allowed is one number for all keywords, at least 1. "
                "Hold out whole prompts."
            )

    def _check_labels(self, classes: int) -> None:
        for words in (self.conditioning, self.held_out, self.null):
            labels = words.get("class_labels", torch.empty(0))
            outside = labels[(labels < 0) | (labels >= classes)]
            if len(outside):
                raise DataError(
                    f"labels: got {int(outside[0])}; the denoiser knows {classes} classes, from 0. "
                    "Number the images' classes as it does."
                )


def _take(words: Conditioning, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value[rows] for name, value in words.items()}


def _shapes(words: Conditioning) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape[1:]) for name, value in words.items()}
