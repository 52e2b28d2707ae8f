"""Finding strategies: every plugin, the built-in ones too, comes through one entry-point group."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import pluggy
from torch import nn

from moediff import hookspecs
from moediff.errors import (
    AmbiguousNameError,
    AnatomyError,
    MoediffError,
    OptionError,
    PluginError,
    PluginWarning,
    UnknownNameError,
    did_you_mean,
)
from moediff.roles import ROLES
from moediff.sampling import check_training
from moediff.subject import Subject

API = 1
GROUP = "moediff"
HOOKS = (*ROLES, "recipes")


@attrs.frozen
class Entry:
    """One name that one plugin offers for one hook."""

    hook: str
    name: str
    value: Any = attrs.field(repr=False)
    distribution: str


@attrs.frozen(eq=False)
class Registry:
    """What is installed: entries by hook and name, and the plugins that were left out and why."""

    entries: Mapping[tuple[str, str], tuple[Entry, ...]]
    broken: Mapping[str, str]

    @classmethod
    def of(cls, plugins: Iterable[tuple[str, Any]], broken: Mapping[str, str]) -> Registry:
        """Ask every plugin, given as (distribution, module), for its strategies, one at a time.

        A plugin that breaks its contract is warned of and left out; the others still work.
        """
        manager = pluggy.PluginManager("moediff")
        manager.add_hookspecs(hookspecs)
        known = list(plugins)
        left_out = dict(broken)
        for distribution, plugin in known:
            try:
                manager.register(plugin, name=distribution)
                manager.check_pending()
            except (pluggy.PluginValidationError, ValueError) as error:
                manager.unregister(plugin) if manager.is_registered(plugin) else None
                left_out[distribution] = f"{error} The hooks are {', '.join(HOOKS)}."
        entries: dict[tuple[str, str], tuple[Entry, ...]] = {}
        for distribution, plugin in manager.list_name_plugin():
            try:
                offered = [e for hook in HOOKS for e in _ask(manager, hook, distribution, plugin)]
            except Exception as error:  # a stranger's code: whatever it raises is its own fault
                left_out[distribution] = str(error)
                continue
            for entry in offered:
                key = (entry.hook, entry.name)
                entries[key] = (*entries.get(key, ()), entry)
        for distribution, reason in left_out.items():
            warnings.warn(
                f"plugin {distribution}: left out: {reason} Update or uninstall it.",
                PluginWarning,
                stacklevel=2,
            )
        return cls(entries, left_out)

    @classmethod
    def load(cls) -> Registry:
        """Read the installed distributions' entry points in the group `moediff`."""
        plugins, broken = [], {}
        for point in _points():
            name = point.dist.name if point.dist else point.value
            label = name if point.name == name else f"{name}:{point.name}"
            made_for = int(point.group.rpartition(".")[2]) if "." in point.group else API
            if made_for != API:
                broken[label] = f"made for plugin API {made_for}; this moediff has API {API}."
                continue
            try:
                plugins.append((label, point.load()))
            except Exception as error:
                broken[label] = f"cannot be imported: {type(error).__name__}: {error}."
        return cls.of(plugins, broken)

    def names(self, hook: str) -> tuple[str, ...]:
        """All names of a hook, sorted."""
        return tuple(sorted(name for kind, name in self.entries if kind == hook))

    def get(self, hook: str, name: str) -> Any:
        """Return the class (or recipe table) of a name.

        Raises:
            UnknownNameError: nobody offers it; the nearest name is suggested.
            AmbiguousNameError: two plugins offer it.
        """
        found = self.entries.get((hook, name), ())
        if not found:
            raise UnknownNameError(
                f"{hook.removesuffix('s')}: got {name!r}.{did_you_mean(name, self.names(hook))}"
            )
        if len(found) > 1:
            owners = " and ".join(entry.distribution for entry in found)
            raise AmbiguousNameError(
                f"{hook.removesuffix('s')}: {name!r} is offered by {owners}. Uninstall one of "
                "them, or pass an instance of the class you mean."
            )
        return found[0].value

    def create(self, hook: str, name: str, options: Mapping[str, Any]) -> Any:
        """Build a strategy from its name and options.

        Raises:
            UnknownNameError: an option that the strategy does not have.
            OptionError: a value that the strategy refuses.
        """
        cls = self.get(hook, name)
        allowed = [a.alias for a in attrs.fields(cls) if a.init]
        for option in options:
            if option not in allowed:
                raise UnknownNameError(
                    f"{name}: unknown option {option!r}.{did_you_mean(option, allowed)}"
                )
        try:
            return cls(**options)
        except MoediffError:
            raise
        except (TypeError, ValueError) as error:
            raise OptionError(f"{name}: {error.args[0] if error.args else error}") from error

    def name_of(self, strategy: Any) -> str:
        """The registered name of a strategy's class, or where the class was defined."""
        for entries in self.entries.values():
            for entry in entries:
                if entry.value is type(strategy):
                    return entry.name
        return f"{type(strategy).__module__}:{type(strategy).__qualname__}"

    def dissect(self, denoiser: nn.Module, scheduler: Any) -> Subject:
        """Find the anatomy of a denoiser by its class.

        Raises:
            AnatomyError: no installed anatomy supports it.
            AmbiguousNameError: several do.
            OptionError: the scheduler is not one to train with.
        """
        check_training(scheduler)
        known = {name: self.get("anatomies", name)() for name in self.names("anatomies")}
        fitting = [name for name, provider in known.items() if provider.supports(denoiser)]
        kind = type(denoiser).__name__
        if not fitting:
            raise AnatomyError(
                f"denoiser: no anatomy for a {kind}; installed are {', '.join(known)}. Install or "
                "write an anatomy plugin."
            )
        if len(fitting) > 1:
            raise AmbiguousNameError(
                f"denoiser: the anatomies {' and '.join(fitting)} all support a {kind}. Uninstall "
                "the plugins of all but one."
            )
        total = int(scheduler.config.num_train_timesteps)
        # A copy, because adding noise moves a scheduler's tensors to the samples' device.
        own = copy.deepcopy(scheduler)
        return Subject(denoiser, own, known[fitting[0]].dissect(denoiser), (0, total))


def _points() -> list[importlib.metadata.EntryPoint]:
    """The entry points of all installed plugins, for this plugin API and for other ones."""
    points = importlib.metadata.entry_points()
    groups = sorted(g for g in points.groups if re.fullmatch(rf"{GROUP}(\.\d+)?", g))
    return [point for group in groups for point in points.select(group=group)]


def _ask(manager: pluggy.PluginManager, hook: str, distribution: str, plugin: Any) -> list[Entry]:
    others = [p for p in manager.get_plugins() if p is not plugin]
    answers = manager.subset_hook_caller(hook, remove_plugins=others)()
    entries = []
    for answer in answers:
        if not isinstance(answer, Mapping):
            raise PluginError(f"hook {hook}: got a {type(answer).__name__}; return name -> class.")
        for name, value in answer.items():
            protocols = ROLES.get(hook, ())
            if protocols and not (
                isinstance(value, type) and attrs.has(value) and _fulfils(value, protocols)
            ):
                verbs = " or ".join(_verbs(p) for p in protocols)
                raise PluginError(
                    f"hook {hook}: {name!r} is {value!r}; return an attrs class with {verbs}."
                )
            entries.append(Entry(hook, name, value, distribution))
    return entries


def _verbs(protocol: type) -> str:
    return ", ".join(sorted(name for name in vars(protocol) if not name.startswith("_")))


def _fulfils(value: type, protocols: Iterable[type]) -> bool:
    return any(
        all(callable(getattr(value, verb, None)) for verb in _verbs(protocol).split(", "))
        for protocol in protocols
    )


@functools.cache
def versions() -> Mapping[str, str]:
    """The version of every plugin's distribution, by the name of its top-level package."""
    return {
        point.module.partition(".")[0]: point.dist.version if point.dist else ""
        for point in _points()
    }


@functools.cache
def installed() -> Registry:
    """The registry of this process, read once."""
    return Registry.load()
