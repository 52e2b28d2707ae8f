"""The hooks of a plugin. Each returns name -> class; nothing is built or run while asking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pluggy

hookspec, hookimpl = pluggy.HookspecMarker("moediff"), pluggy.HookimplMarker("moediff")


@hookspec
def scorers() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Strategies that say what an expert needs."""


@hookspec
def clusterers() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Strategies that split the timesteps into intervals."""


@hookspec
def gates() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Strategies that spend the budget over the experts."""


@hookspec
def pruners() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Strategies that say what may be removed, and remove it."""


@hookspec
def counters() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Strategies that measure and price what a denoiser costs."""


@hookspec
def tuners() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Strategies that train experts before, or mixtures after, the pruning."""


@hookspec
def metrics() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Strategies that measure a finished mixture beside the base model."""


@hookspec
def anatomies() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Strategies that know the layers and units of a class of denoisers."""


@hookspec
def reports() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Strategies that show what there is to know about a finished run."""


@hookspec
def recipes() -> Mapping[str, Mapping[str, Any]]:  # type: ignore[empty-body]
    """Whole recipes, written as the tables of a recipe file."""
