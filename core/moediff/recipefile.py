"""Reading a recipe: from a registered name, a TOML file, or plain tables."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from moediff.cost import Budget
from moediff.errors import MoediffError, OptionError, UnknownNameError, did_you_mean
from moediff.recipe import COMPONENTS, Recipe
from moediff.registry import Registry, installed
from moediff.sampling import Sampling


def _component(registry: Registry, hook: str, value: Any) -> Any:
    """A strategy from a table, a bare name or an instance."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping):
        options = dict(value)
        if "name" not in options:
            raise OptionError(
                f"{hook.removesuffix('s')}: got the table {options} without a `name`; allowed are "
                f"{', '.join(registry.names(hook))}. Name one, or start from a recipe that does: "
                'base = "moedm".'
            )
        return registry.create(hook, options.pop("name"), options)
    return value


def recipe_from_tables(tables: Mapping[str, Any], registry: Registry | None = None) -> Recipe:
    """Build a recipe from plain tables; values may also be instances.

    Raises:
        UnknownNameError: an unknown table, strategy or option.
        OptionError: a table that is required is missing, or a value is refused.
    """
    registry = registry or installed()
    allowed = [field.name for field in attrs.fields(Recipe)]
    for key in tables:
        if key not in allowed:
            raise UnknownNameError(f"recipe: unknown key {key!r}.{did_you_mean(key, allowed)}")
    missing = [f.name for f in attrs.fields(Recipe) if f.default is attrs.NOTHING]
    missing = [name for name in missing if tables.get(name) is None]
    if missing:
        raise OptionError(f"recipe: {', '.join(missing)} missing; add a table for each.")
    values = dict(tables)
    for field, (hook, _) in COMPONENTS.items():
        if field in values:
            values[field] = _component(registry, hook, values[field])
    budget = values["budget"]
    if isinstance(budget, Mapping):
        content = {"of": "live", **budget}
        extra = set(content) - {"value", "counter", "of"}
        if extra or len(content) < 3:
            raise OptionError(
                f"budget: got the keys {sorted(budget)}; allowed are value, counter and of."
            )
        content["counter"] = _component(registry, "counters", content["counter"])
        values["budget"] = _build(Budget, content)
    if isinstance(values.get("sampling"), Mapping):
        values["sampling"] = _build(Sampling, values["sampling"])
    recipe: Recipe = _build(Recipe, values)
    return recipe


def _build(cls: type[Any], options: Mapping[str, Any]) -> Any:
    try:
        return cls(**options)
    except MoediffError:
        raise
    except (TypeError, ValueError) as error:
        reason = error.args[0] if error.args else error  # attrs appends the field and the value
        allowed = ", ".join(field.name for field in attrs.fields(cls))
        raise OptionError(f"{cls.__name__.lower()}: {reason}. The fields are {allowed}.") from error


def load_recipe(source: str | Path, registry: Registry | None = None, **overrides: Any) -> Recipe:
    """Load a registered recipe by name, or a TOML file, and override parts of it.

    Args:
        source: a name such as "moedm", or the path of a `.toml` file. A file may start from a
            registered recipe with `base = "moedm"`.
        registry: where names are looked up; the installed plugins by default.
        overrides: recipe fields; `budget` may be a bare share, a strategy a name or an instance.

    Raises:
        UnknownNameError: no such recipe, file, table or option.
    """
    registry = registry or installed()
    path = Path(source)
    if path.suffix == ".toml":
        tables = _read_toml(path)
        for extra in ("model", "task"):  # what a run is about, not how it is built
            tables.pop(extra, None)
        if "base" in tables:
            tables = merge(dict(registry.get("recipes", tables.pop("base"))), tables)
    else:
        tables = dict(registry.get("recipes", str(source)))
    if isinstance(overrides.get("budget"), (int, float)):
        overrides["budget"] = {**tables.get("budget", {}), "value": overrides["budget"]}
    return recipe_from_tables({**tables, **overrides}, registry)


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a file's tables over a recipe's: a table without a `name` changes single options."""
    merged = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        deep = isinstance(value, Mapping) and isinstance(old, Mapping) and "name" not in value
        merged[key] = merge(dict(old), value) if deep else value  # type: ignore[arg-type]
    return merged


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnknownNameError(f"recipe: cannot read {path}: {error.strerror}.") from error
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"recipe: {path} is not valid TOML: {error}.") from error
