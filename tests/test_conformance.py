"""Every installed strategy keeps the promises of its role; a new one cannot hide."""

from __future__ import annotations

import math
from typing import Any

import pytest

import moediff
from moediff.roles import ROLES
from moediff.testing import CHECKS, check_strategy

QUICK: dict[tuple[str, str], dict[str, Any]] = {
    ("clusterers", "alignment"): {"stride": 25, "images": 4, "batch": 4},
    ("clusterers", "loss-similarity"): {"stride": 25, "images": 4, "batch": 4},
    ("counters", "latency"): {"rounds": 3},
    ("gates", "era"): {"steps": 2, "batch": 2, "hidden": 16},
    ("gates", "independent"): {"steps": 2, "batch": 2},
    ("gates", "learned-expansion"): {"steps": 4, "batch": 2},
    ("metrics", "frechet"): {"samples": 4},
    ("metrics", "kernel"): {"samples": 4, "subsets": 4},
    ("metrics", "latency"): {"pairs": 3},
    ("scorers", "ablation-l1"): {"images": 1},
    ("scorers", "diff-pruning"): {"samples": 4, "stride": 250},
    ("tuners", "bitfit"): {"steps": 4, "batch": 4},
    ("tuners", "distill"): {"steps": 4, "images": 4, "batch": 4},
    ("tuners", "elastic"): {"depth_steps": 2, "width_steps": 2, "batch": 4, "subnets": 2},
    ("tuners", "finetune"): {"steps": 4, "batch": 4},
    ("tuners", "partial"): {"steps": 4, "batch": 4},
}
"""Options that make the costly strategies quick; the others are checked with their defaults."""

EXCEPTIONS: dict[tuple[str, str], tuple[dict[str, Any], str]] = {
    ("counters", "latency"): ({"tolerance": math.inf}, "no two timings are equal"),
    ("gates", "independent"): ({"ordered": False}, "it learns an order of its own"),
    ("gates", "learned-expansion"): ({"of": ("stored",)}, "copies do not change the live cost"),
    ("metrics", "latency"): ({"repeatable": False}, "no two timings are equal"),
}
"""Promises that a strategy cannot keep: the option that excuses it from one, and the reason."""

INSTALLED = [(hook, name) for hook in ROLES for name in moediff.installed().names(hook)]


@pytest.mark.parametrize(("hook", "name"), INSTALLED)
def test_strategy(hook: str, name: str) -> None:
    strategy = moediff.installed().create(hook, name, QUICK.get((hook, name), {}))
    options, _ = EXCEPTIONS.get((hook, name), ({}, ""))
    check_strategy(hook, strategy, **options)


def test_every_role_is_checked_and_the_tables_name_what_is_installed() -> None:
    assert set(CHECKS) == set(ROLES) == {hook for hook, _ in INSTALLED}
    assert {*QUICK, *EXCEPTIONS} <= set(INSTALLED)
    assert all(reason for _, reason in EXCEPTIONS.values())
