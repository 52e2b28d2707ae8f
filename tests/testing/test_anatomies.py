"""The kit catches wrong anatomies: one broken provider for each promise."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from torch import nn

import moediff
from moediff.testing import check_anatomy, tiny_unet
from tests.testing.catching import caught


@attrs.frozen
class Describing:
    """The built-in anatomy, spoilt."""

    spoil: str = ""

    def supports(self, denoiser: nn.Module) -> bool:
        return self.spoil == "anything" or hasattr(denoiser, "down_blocks")

    def dissect(self, denoiser: nn.Module) -> Any:
        anatomy = moediff.installed().create("anatomies", "unet2d", {}).dissect(denoiser)
        first, *others = anatomy.layers
        width, *more = first.widths
        match self.spoil:
            case "twice":
                others = [first, *others]
            case "slice":
                gone = attrs.evolve(width.slices[0], module="nowhere")
                width = attrs.evolve(width, slices=(gone, *width.slices[1:]))
            case "consumer":
                width = attrs.evolve(width, consumer="nowhere")
            case "size":
                width = attrs.evolve(width, count=width.count - 1)
            case "axis":
                width = attrs.evolve(width, axis=3, count=4, size=2)
            case "producer":
                # Where the paper multiplies: the closed channels' bias still leaks.
                width = attrs.evolve(width, consumer=width.consumer.replace("conv2", "norm2"))
            case "bypass":
                last = attrs.evolve(others[-1], bypass="shortcut", shortcut=None)
                others = [*others[:-1], last]
            case "none":
                return moediff.Anatomy(())
        first = attrs.evolve(first, widths=(width, *more))
        return moediff.Anatomy((first, *others))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("anything", "supports what it knows"),
        ("none", "returns an Anatomy with units"),
        ("twice", "the names of units are unique"),
        ("slice", "nowhere exists"),
        ("consumer", "nowhere exists"),
        ("size", "has count x size x blocks channels"),
        ("producer", "mask = cut"),
    ],
)
def test_wrong_anatomies_are_caught(spoil: str, message: str) -> None:
    caught(lambda provider: check_anatomy(provider, tiny_unet()), Describing(spoil), message)


def test_a_good_anatomy_passes() -> None:
    check_anatomy(Describing(), tiny_unet())
