"""Invariant 10: one clear message for each way in which a plugin can be wrong; the others work."""

from __future__ import annotations

import importlib
import re
import warnings
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from torch import nn

import moediff
from moediff import Registry, hookimpl
from moediff.errors import (
    AmbiguousNameError,
    AnatomyError,
    OptionError,
    PluginWarning,
    UnknownNameError,
)
from moediff.registry import versions
from tests.conftest import tiny_unet
from tests.core.toys import Draw, ToyPlugin


def module(**functions: Any) -> ModuleType:
    """A plugin as pluggy sees it, with the given hook functions."""
    made = ModuleType("made")
    for name, function in functions.items():
        setattr(made, name, hookimpl(function))
    return made


def plugin(**hooks: Any) -> ModuleType:
    """A plugin whose hooks return the given values."""
    return module(**{name: lambda value=value: value for name, value in hooks.items()})


def registry(*plugins: tuple[str, Any]) -> Registry:
    return Registry.of(plugins, {})


TOYS = registry(("toys", ToyPlugin))


class Plain:
    """A scorer that is no attrs class."""

    def score(self, expert: Any, task: Any, run: Any) -> None: ...


@attrs.frozen
class NoVerb:
    """An attrs class that scores nothing."""


def explode() -> None:
    raise ZeroDivisionError("inside the hook")


BROKEN: dict[str, tuple[Any, str]] = {
    "misspelt hook": (plugin(scoerrs={}), "scoerrs.*The hooks are scorers, clusterers"),
    "hook with an argument": (module(scorers=lambda wrong: {}), "wrong"),
    "hook that returns a list": (plugin(scorers=[Draw]), "hook scorers: got a list; return name"),
    "hook that returns an instance": (
        plugin(scorers={"x": Draw()}),
        "'x' is Draw.*return an attrs",
    ),
    "class that is no attrs class": (
        plugin(scorers={"x": Plain}),
        "return an attrs class with score",
    ),
    "class of another role": (plugin(gates={"x": Draw}), "hook gates: 'x'.*with allocate"),
    "class without a verb": (plugin(tuners={"x": NoVerb}), "prepare or recover"),
    "hook that raises": (module(scorers=explode), "inside the hook"),
}


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_a_broken_plugin_is_warned_of_once_and_the_others_work(kind: str) -> None:
    wrong, message = BROKEN[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = registry(
            ("before", plugin(scorers={"a": Draw})), ("strange", wrong), ("toys", ToyPlugin)
        )
    assert [entry.category for entry in caught] == [PluginWarning]
    text = str(caught[0].message)
    assert text.startswith("plugin strange: left out: ")
    assert text.endswith("Update or uninstall it.")
    assert re.search(message, text, re.DOTALL), text
    assert list(found.broken) == ["strange"]
    assert found.names("scorers") == ("a", "draw", "per-interval")
    assert found.names("gates") == ("greedy",)


def test_a_plugin_that_is_half_right_is_left_out_whole() -> None:
    half = plugin(scorers={"good": Draw}, gates={"bad": Draw})
    with pytest.warns(PluginWarning, match="plugin half: left out"):
        assert registry(("half", half)).names("scorers") == ()


def test_two_plugins_with_one_name_are_named_when_it_is_used() -> None:
    found = registry(
        ("one", plugin(scorers={"x": Draw, "y": Draw})), ("two", plugin(scorers={"x": Draw}))
    )
    assert found.names("scorers") == ("x", "y")
    assert found.get("scorers", "y") is Draw
    with pytest.raises(AmbiguousNameError, match="scorer: 'x' is offered by one and two"):
        found.create("scorers", "x", {})


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(
        UnknownNameError, match=r"scorer: got 'darw'\. Did you mean 'draw'\? Allowed"
    ):
        TOYS.create("scorers", "darw", {})
    with pytest.raises(UnknownNameError, match="Allowed: none"):
        TOYS.get("metrics", "fid")


def test_an_unknown_option_suggests_the_nearest() -> None:
    with pytest.raises(
        UnknownNameError, match=r"draw: unknown option 'scal'\. Did you mean 'scale'"
    ):
        TOYS.create("scorers", "draw", {"scal": 2})


@pytest.mark.parametrize("value", [0.0, -1, "big"])
def test_a_refused_value_names_the_strategy(value: Any) -> None:
    with pytest.raises(OptionError, match=r"draw: .*scale|draw: .*str"):
        TOYS.create("scorers", "draw", {"scale": value})


def test_create_passes_the_options() -> None:
    assert TOYS.create("scorers", "draw", {"scale": 3.0}) == Draw(3.0)


def test_names_of_strategies_there_and_back() -> None:
    assert TOYS.name_of(Draw(2.0)) == "draw"
    assert TOYS.name_of(NoVerb()) == f"{__name__}:NoVerb"


def test_dissect_finds_the_anatomy_by_the_models_class() -> None:
    subject = moediff.installed().dissect(tiny_unet(), DDPMScheduler(num_train_timesteps=50))
    assert subject.interval == (0, 50)
    with pytest.raises(AnatomyError, match=r"no anatomy for a Linear; installed are .*unet2d"):
        moediff.installed().dissect(nn.Linear(2, 2), DDPMScheduler())


def test_versions_are_by_package() -> None:
    assert versions()["moediff_plugins"] == version("moediff")


def test_two_anatomies_of_one_model_are_named() -> None:
    known = moediff.installed().get("anatomies", "unet2d")
    found = registry(("one", plugin(anatomies={"x": known, "y": known})))
    with pytest.raises(AmbiguousNameError, match="the anatomies x and y all support a UNet2DModel"):
        found.dissect(tiny_unet(), DDPMScheduler())


def test_dissect_refuses_a_scheduler_that_cannot_train() -> None:
    with pytest.raises(OptionError, match="got a EulerDiscreteScheduler"):
        moediff.installed().dissect(tiny_unet(), EulerDiscreteScheduler())


def distribution(folder: Path, name: str, entry_points: str, module: str) -> None:
    """An installed distribution, as pip leaves it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    (folder / f"{name}.py").write_text(module)


GOOD = """
import attrs, moediff
@attrs.frozen
class Mine:
    '''Scores.'''
    def score(self, expert, task, run): ...
@moediff.hookimpl
def scorers(): return {"load-test": Mine}
"""


def test_installed_plugins_are_found_and_faulty_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "loadtest_good", "[moediff]\nx = loadtest_good\n", GOOD)
    distribution(
        tmp_path,
        "loadtest_import",
        "[moediff]\nloadtest_import = loadtest_import\n",
        "import not_there",
    )
    distribution(
        tmp_path, "loadtest_api", "[moediff.99]\nloadtest_api = loadtest_api\n", "raise SystemExit"
    )
    distribution(
        tmp_path,
        "loadtest_one",
        "[moediff.1]\nloadtest_one = loadtest_one\n",
        GOOD.replace("load-test", "numbered"),
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = Registry.load()
    messages = sorted(str(entry.message) for entry in caught)
    assert len(messages) == 2
    assert messages[0].startswith("plugin loadtest_api: left out: made for plugin API 99; this")
    assert "loadtest_import: left out: cannot be imported: ModuleNotFoundError" in messages[1]
    assert {"load-test", "numbered"} <= set(found.names("scorers"))
    assert "unet2d" in found.names("anatomies")
    owner = found.entries["scorers", "load-test"][0].distribution
    assert owner == "loadtest_good:x"


def test_the_built_in_plugin_comes_through_the_same_group() -> None:
    entry = moediff.installed().entries["anatomies", "unet2d"][0]
    assert entry.distribution == "moediff"
    assert moediff.installed() is moediff.installed()
