"""Feature extractors of the Frechet and kernel distances, by the name that the figure carries."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import interpolate

from moediff.errors import ArtefactError, DataError, OptionError, UnknownNameError, did_you_mean

Extractor = nn.Module
"""Images (n, C, H, W) in [-1, 1], on the module's device -> features (n, D)."""

SQUEEZENET = "squeezenet1_0_imagenet.safetensors"

INSTALL = "Install the metrics: pip install moediff[metrics]."


class _Digits(nn.Module):
    """The 64 features of the classifier that ships with the digits."""

    def __init__(self) -> None:
        super().__init__()
        from moediff_plugins.digits import load_classifier

        self.classifier = load_classifier()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1:] != (1, 8, 8):
            raise DataError(
                f"digits: got images of shape {tuple(images.shape[1:])}; allowed is (1, 8, 8). "
                "Use another extractor for other images, for example 'squeezenet'."
            )
        return self.classifier.features(images)


class _Inception(nn.Module):
    """The 2,048 features of clean-fid's Inception; the weights are downloaded at first use."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from cleanfid.inception_torchscript import InceptionV3W
        except ImportError as error:
            raise OptionError(f"inception: {error}. {INSTALL}") from error
        # clean-fid's own `feature_extractor` hides the network, which could not change its device.
        self.network = InceptionV3W(tempfile.gettempdir(), download=True, resize_inside=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(_colour("inception", images))
        return features


class _SqueezeNet(nn.Module):
    """The 512 features of SqueezeNet 1.0 (Iandola et al., 2016): fire9, averaged over the image.

    Images are resized to 227 pixels, bilinearly (with antialiasing where that is smaller). The
    weights are Caffe's original ones, hence BGR from 0 to 255 minus the mean; torchvision's own,
    trained for other inputs, would give other figures.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            from torchvision.models.squeezenet import SqueezeNet
        except ImportError as error:
            raise OptionError(f"squeezenet: {error}. {INSTALL}") from error
        with torch.device("meta"):  # initial weights would move the global random state
            self.trunk = SqueezeNet("1_0").features
        _fill_squeezenet(self.trunk, weights)
        # Twice as fast on a CPU, and the same sums in another order.
        self.trunk.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor([104.0, 117.0, 123.0], device=images.device).view(1, 3, 1, 1)
        centred = _colour("squeezenet", images).flip(1) - mean
        # Eight images' activations outgrow a core's cache: less than 4/5 of the speed.
        parts = torch.split(centred, 4 if images.device.type == "cpu" else len(images))
        return torch.cat([self._features(part) for part in parts])

    def _features(self, centred: torch.Tensor) -> torch.Tensor:
        centred = centred.contiguous(memory_format=torch.channels_last)
        resized = interpolate(centred, (227, 227), mode="bilinear", antialias=True)
        features: torch.Tensor = self.trunk(resized).mean(dim=(2, 3))
        return features


def _fill_squeezenet(trunk: nn.Module, file: Path) -> None:
    """Put the weights of a file that has Caffe's layer names into torchvision's network."""
    import safetensors.torch

    places = (3, 4, 5, 7, 8, 9, 10, 12)  # between them, pooling
    layers = {"conv1": "0"} | {f"fire{n}": str(place) for n, place in enumerate(places, start=2)}
    convolutions = {"squeeze": "squeeze", "e1": "expand1x1", "e3": "expand3x3"}
    state = {}
    try:
        for name, tensor in safetensors.torch.load_file(file).items():
            path, kind = name.rsplit(".", 1)
            layer, *convolution = path.split("/")
            if layer != "conv_final":  # behind the features
                inside = [convolutions[part] for part in convolution]
                state[".".join([layers[layer], *inside, kind])] = tensor.float()
        trunk.load_state_dict(state, assign=True)
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ArtefactError(
            f"{file}: is not SqueezeNet 1.0 with Caffe's layer names ({error}). Replace it."
        ) from error


def _colour(name: str, images: torch.Tensor) -> torch.Tensor:
    """Images (n, 1 or 3, H, W) in [-1, 1] as (n, 3, H, W) from 0 to 255."""
    if images.shape[1] not in (1, 3):
        raise DataError(
            f"{name}: got samples of {images.shape[1]} channels; allowed are images of 1 or 3. "
            "Latents have to be decoded first."
        )
    return (images.clamp(-1, 1) + 1).mul(127.5).expand(-1, 3, -1, -1)


def _weights(file: str, data: str | None) -> Path:
    """Where the file of an extractor's weights is."""
    folder = data or os.environ.get("MOEDIFF_DATA")
    if folder is None:
        found = "no folder was given"
    elif not Path(folder, file).is_file():
        found = f"it is not in {folder}"
    else:
        return Path(folder, file)
    raise ArtefactError(
        f"extractor: needs {file}, and {found}. Put it into a folder and name that in the metric's "
        "`data` or in the environment variable MOEDIFF_DATA, or use the extractor 'inception'."
    )


EXTRACTORS: Mapping[str, Callable[[str | None], Extractor]] = {
    "digits": lambda data: _Digits(),
    "inception": lambda data: _Inception(),
    "squeezenet": lambda data: _SqueezeNet(_weights(SQUEEZENET, data)),
}


def load_extractor(name: str, data: str | None = None) -> Extractor:
    """Load an extractor by name, onto the CPU and in eval mode.

    Args:
        name: one of `EXTRACTORS`.
        data: the folder of weights that do not ship with moediff and cannot be downloaded; by
            default, what the environment variable MOEDIFF_DATA names.

    Raises:
        UnknownNameError: no such extractor.
        ArtefactError: its weights are not there, or are something else.
        OptionError: a package that it needs is not installed.
    """
    if name not in EXTRACTORS:
        raise UnknownNameError(f"extractor: got {name!r}.{did_you_mean(name, EXTRACTORS)}")
    return EXTRACTORS[name](data).eval()


def figure_name(name: str, extractor: str) -> str:
    """What a distance on an extractor's features is called: FID and KID only with Inception's."""
    return f"{name[0]}ID" if extractor == "inception" else f"{name}[{extractor}]"
