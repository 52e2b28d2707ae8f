"""Any scorer works with any clusterer, gate, pruner and counter: DESIGN's promise, executed."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch
from diffusers import DDPMScheduler

import moediff
from moediff.errors import IncompatibleError
from moediff_plugins.tuners.elastic import Elastic
from tests.conftest import tiny_task, tiny_unet

OPTIONS = {
    "ablation-l1": {"images": 1, "batch": 64},
    "alignment": {"stride": 250, "images": 4, "batch": 4},
    "era": {"steps": 1, "batch": 2, "hidden": 8},
    "independent": {"steps": 1, "batch": 2},
    "latency": {"batch": 64, "rounds": 15},  # with fewer, a busy moment may put a floor too high
    "learned-expansion": {"live": 0.8, "steps": 1, "batch": 2},
}
"""Options that make the costly strategies quick; the others run with their defaults."""

BUDGETS = {
    "learned-expansion": {"of": "stored", "value": 0.9},
    "latency": {"value": 0.9},  # most of a tiny net's time is starting its kernels
}
"""Where a gate or a counter asks for another budget than 0.75 of the live cost."""

ROLES = ("scorers", "clusterers", "gates", "pruners", "counters")
REGISTRY = moediff.installed()
NAMES = [REGISTRY.names(role) for role in ROLES]
FULL = list(itertools.product(*NAMES))


def covering(grid: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """A small part of the grid in which every pair of strategies of two roles occurs."""
    missing = {pair for row in grid for pair in pairs_of(row)}
    chosen = []
    while missing:
        best = max(grid, key=lambda row: len(missing & pairs_of(row)))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


def pairs_of(row: tuple[str, ...]) -> set[tuple[tuple[int, str], ...]]:
    return set(itertools.combinations(enumerate(row), 2))


def recipe_of(row: tuple[str, ...]) -> moediff.Recipe:
    made = [
        REGISTRY.create(role, name, OPTIONS.get(name, {}))
        for role, name in zip(ROLES, row, strict=True)
    ]
    scorer, clusterer, gate, pruner, counter = made
    sampling = moediff.Sampling("ddim", 2)
    asked = {"value": 0.75, **BUDGETS.get(row[4], {}), **BUDGETS.get(row[2], {})}
    budget = moediff.Budget(counter=counter, **asked)
    return moediff.Recipe(scorer, clusterer, gate, pruner, budget, sampling=sampling)


def build(row: tuple[str, ...], cache: Path) -> moediff.ExpertMixture:
    unet = tiny_unet(layers_per_block=1)
    return moediff.build_experts(unet, DDPMScheduler(), tiny_task(), recipe_of(row), cache=cache)


def check(rows: list[tuple[str, ...]], folder: Path) -> None:
    """Build every mixture, run it, save it, and load them all in one fresh process, bit-equal."""
    torch.manual_seed(0)
    sample, timesteps = torch.randn(3, 3, 8, 8), torch.tensor([20, 500, 999])
    for number, row in enumerate(rows):
        mixture = build(row, folder / "stages")
        with torch.no_grad():
            output = mixture(sample, timesteps).sample
        assert torch.isfinite(output).all(), row
        mixture.save_pretrained(folder / str(number))
        torch.save({"sample": sample, "t": timesteps, "out": output}, folder / f"{number}.pt")
    script = (
        "import sys, torch, moediff\n"
        "torch.set_num_threads(1)\n"
        "for number in range(int(sys.argv[2])):\n"
        "    wanted = torch.load(f'{sys.argv[1]}/{number}.pt')\n"
        "    mixture = moediff.ExpertMixture.from_pretrained(f'{sys.argv[1]}/{number}')\n"
        "    with torch.no_grad():\n"
        "        output = mixture(wanted['sample'], wanted['t']).sample\n"
        "    assert torch.equal(output, wanted['out']), number\n"
        "print('equal', sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(len(rows))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == f"equal {len(rows)}\n", result.stderr


def test_the_covering_set_holds_every_pair() -> None:
    rows = covering(FULL)
    assert {pair for row in rows for pair in pairs_of(row)} == {
        pair for row in FULL for pair in pairs_of(row)
    }
    assert len(rows) < len(FULL) / 2


def test_pairwise_covering_set(tmp_path: Path) -> None:
    check(covering(FULL), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("gate", REGISTRY.names("gates"))
def test_full_grid(gate: str, tmp_path: Path) -> None:
    check([row for row in FULL if gate in row], tmp_path)


def test_no_pair_of_the_five_roles_is_refused() -> None:
    """What declarations refuse among the built-in strategies: nothing inside the five roles."""
    for row in FULL:
        recipe_of(row)


def test_the_one_refusal_is_elastic_width_without_widths() -> None:
    recipe = recipe_of(("magnitude", "uniform", "one-hot", "mid-layer", "params"))
    with pytest.raises(IncompatibleError, match="Elastic needs widths"):
        attrs.evolve(recipe, prepare=Elastic())
