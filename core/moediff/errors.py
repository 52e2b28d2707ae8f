"""What can go wrong: one class per kind, each also the builtin that a caller would catch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoediffError(Exception):
    """Base of every error that moediff raises on purpose."""


class UnknownNameError(MoediffError, LookupError):
    """A strategy, option, layer or unit name that nobody knows."""


class AmbiguousNameError(MoediffError, LookupError):
    """A strategy name that two plugins claim."""


class OptionError(MoediffError, ValueError):
    """An option outside what is allowed."""


class DataError(MoediffError, ValueError):
    """Images, labels or timesteps of the wrong shape, type or range."""


class BudgetError(MoediffError, ValueError):
    """A budget that cannot be reached."""


class PlanError(MoediffError, ValueError):
    """A plan that does not fit the denoiser or itself."""


class IncompatibleError(MoediffError, ValueError):
    """Strategies that cannot work together, known from what they declare."""


class AnatomyError(MoediffError, TypeError):
    """A denoiser for which no anatomy is installed, or a part of it that has no rule."""


class CountError(MoediffError, NotImplementedError):
    """An operator that a counter has no rule for."""


class PluginError(MoediffError, RuntimeError):
    """A plugin that broke its contract."""


class ArtefactError(MoediffError, OSError):
    """A saved file that is missing, truncated or altered."""


class WorkdirError(MoediffError, OSError):
    """A run folder that cannot be used for this run."""


class NoEffectWarning(UserWarning):
    """A strategy ran and changed nothing."""


class PluginWarning(UserWarning):
    """A plugin was left out; the others still work."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Finish an error message: the nearest allowed name, then all of them."""
    names = sorted(allowed)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{hint} Allowed: {', '.join(names) or 'none'}."
