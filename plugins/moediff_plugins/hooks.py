"""The built-in plugin: everything that ships with moediff, by name."""

from __future__ import annotations

from collections.abc import Mapping

from moediff.hookspecs import hookimpl
from moediff_plugins.anatomies.unet2d import UNet2D


@hookimpl
def anatomies() -> Mapping[str, type]:
    """Models whose insides are known."""
    return {"unet2d": UNet2D}
