"""Recipes by name and from files: read as they were meant, or refused with one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from moediff import Budget, Recipe, Registry, Sampling, load_recipe
from moediff.errors import BudgetError, OptionError, UnknownNameError
from moediff.recipefile import merge, recipe_from_tables
from tests.core.toys import (
    Count,
    Draw,
    Even,
    Greedy,
    Layers,
    Nudge,
    PerInterval,
    ToyPlugin,
    recipe,
)

TOYS = Registry.of([("toys", ToyPlugin)], {})


def toml(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_a_registered_recipe_by_name() -> None:
    assert load_recipe("toy", TOYS) == Recipe(
        scorer=Draw(2.0),
        clusterer=Even(),
        gate=Greedy(),
        pruner=Layers(),
        recover=Nudge(0.1),
        budget=Budget(0.5, Count()),
        experts=3,
        sampling=Sampling("ddim", steps=7),
    )


@attrs.frozen
class Others(Layers):
    """A pruner that nobody has registered."""


def test_overrides() -> None:
    changed = load_recipe(
        "toy",
        TOYS,
        budget=0.25,
        experts=5,
        scorer="per-interval",
        recover=None,
        pruner=Others(),
        seed=4,
    )
    assert changed.budget == Budget(0.25, Count())
    assert (changed.experts, changed.seed, changed.recover) == (5, 4, None)
    assert (changed.scorer, changed.pruner) == (PerInterval(), Others())


def test_a_file_that_starts_from_a_registered_recipe(tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        """
        base = "toy"
        experts = 2
        model = { path = "elsewhere" }
        [scorer]
        scale = 5.0
        [budget]
        value = 0.3
        [sampling]
        steps = 9
        [gate]
        name = "greedy"
        """,
    )
    changed = load_recipe(path, TOYS)
    assert changed == attrs.evolve(
        load_recipe("toy", TOYS),
        experts=2,
        scorer=Draw(5.0),
        budget=Budget(0.3, Count()),
        sampling=Sampling("ddim", steps=9),
    )
    assert load_recipe(path, TOYS, budget=0.9).budget.value == 0.9


def test_a_file_without_a_base(tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        """
        scorer = "draw"
        clusterer = "even"
        gate = "greedy"
        pruner = "layers"
        budget = { value = 0.5, counter = "count", of = "stored" }
        """,
    )
    assert load_recipe(path, TOYS) == Recipe(
        Draw(), Even(), Greedy(), Layers(), Budget(0.5, Count(), "stored")
    )


WHOLE = """
clusterer = "even"
gate = "greedy"
pruner = "layers"
"""
TOY = 'base = "toy"\n'
FILES: dict[str, tuple[str, type[Exception], str]] = {
    "unknown table": (TOY + "[scoer]", UnknownNameError, "Did you mean 'scorer'"),
    "unknown base": ("base = 'toi'", UnknownNameError, "recipe: got 'toi'. Did you mean 'toy'"),
    "unknown strategy": (TOY + "scorer = 'darw'", UnknownNameError, "Did you mean 'draw'"),
    "unknown option": (TOY + "[scorer]\nscal = 1", UnknownNameError, "unknown option 'scal'"),
    "refused option": (TOY + "[scorer]\nscale = -1", OptionError, "draw: .*scale"),
    "no name": (
        WHOLE + "scorer = {scale = 1}\nbudget = {value = 1}",
        OptionError,
        "without a `name`",
    ),
    "missing tables": ("scorer = 'draw'", OptionError, "clusterer, gate, pruner, budget missing"),
    "no TOML": ("base =", OptionError, "is not valid TOML"),
    "budget of zero": (TOY + "[budget]\nvalue = 0", BudgetError, "budget: got 0.0"),
    "budget over one": (TOY + "[budget]\nvalue = 1.5", BudgetError, "budget: got 1.5"),
    "budget key": (TOY + "[budget]\nvalu = 0.5", OptionError, "budget: got the keys"),
    "budget of": (TOY + "[budget]\nof = 'dead'", OptionError, "'of' must be in"),
    "budget word": (TOY + "[budget]\nvalue = 'half'", OptionError, "could not convert"),
    "experts word": (TOY + "experts = 'two'", OptionError, "recipe: "),
    "experts zero": (TOY + "experts = 0", OptionError, "'experts' must be >= 1"),
    "steps zero": (TOY + "[sampling]\nsteps = 0", OptionError, "'steps' must be >= 1"),
    "sampling key": (TOY + "[sampling]\nstep = 3", OptionError, "The fields are scheduler, steps"),
    "scheduler": (TOY + "[sampling]\nscheduler = 'dimm'", UnknownNameError, "mean 'ddim'"),
}


@pytest.mark.parametrize("kind", sorted(FILES))
def test_bad_files_get_one_clear_error(kind: str, tmp_path: Path) -> None:
    text, error, message = FILES[kind]
    with pytest.raises(error, match=message):
        load_recipe(toml(tmp_path, text), TOYS)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"cannot read .*none\.toml"):
        load_recipe(tmp_path / "none.toml", TOYS)


def test_a_bare_budget_needs_a_counter_from_somewhere(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="budget: got the keys"):
        load_recipe(toml(tmp_path, WHOLE + "scorer = 'draw'"), TOYS, budget=0.5)


def test_tables_there_and_back() -> None:
    for built in (load_recipe("toy", TOYS), recipe(), recipe(prepare=Nudge(), seed=3)):
        tables = json.loads(json.dumps(built.to_tables(TOYS)))
        assert recipe_from_tables(tables, TOYS) == built


def test_merge_lays_options_over_options_and_replaces_named_tables() -> None:
    base: dict[str, Any] = {"scorer": {"name": "a", "x": 1, "y": 2}, "experts": 2}
    assert merge(base, {"scorer": {"x": 3}})["scorer"] == {"name": "a", "x": 3, "y": 2}
    assert merge(base, {"scorer": {"name": "b"}})["scorer"] == {"name": "b"}
    assert merge(base, {"experts": 4})["experts"] == 4
    assert base == {"scorer": {"name": "a", "x": 1, "y": 2}, "experts": 2}
