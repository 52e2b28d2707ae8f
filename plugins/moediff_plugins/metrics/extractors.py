"""Feature extractors of the Frechet distance, by the name that the figure carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from moediff.errors import UnknownNameError, did_you_mean

Extractor = Callable[[torch.Tensor], torch.Tensor]
"""Images (n, C, H, W) in [-1, 1] -> features (n, D)."""


def digits() -> Extractor:
    """64 features of the classifier that ships with the digits."""
    from moediff_plugins.digits import load_classifier

    return load_classifier().features


def inception() -> Extractor:
    """2,048 features of clean-fid's Inception; the weights are downloaded at first use."""
    from cleanfid.features import feature_extractor

    model = feature_extractor(name="torchscript_inception", resize_inside=True)

    def features(images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = model((images.clamp(-1, 1) + 1) * 127.5)
        return result

    return features


EXTRACTORS: Mapping[str, Callable[[], Extractor]] = {"digits": digits, "inception": inception}


def load_extractor(name: str) -> Extractor:
    """Load an extractor by name.

    Raises:
        UnknownNameError: no such extractor.
    """
    if name not in EXTRACTORS:
        raise UnknownNameError(f"extractor: got {name!r}.{did_you_mean(name, EXTRACTORS)}")
    return EXTRACTORS[name]()
