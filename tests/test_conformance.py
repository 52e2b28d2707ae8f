"""Every installed strategy keeps the promises of its role; a new one cannot hide."""

from __future__ import annotations

import pytest

import moediff
from moediff.roles import ROLES
from moediff.testing import check_strategy

QUICK = {
    "ablation-l1": {"images": 1},
    "alignment": {"stride": 25, "images": 4, "batch": 4},
    "distill": {"steps": 4, "images": 4, "batch": 4},
    "elastic": {"depth_steps": 2, "width_steps": 2, "batch": 4},
    "era": {"steps": 2, "batch": 2, "hidden": 16},
    "finetune": {"steps": 4, "batch": 4},
}
"""Options that make the costly strategies quick; the others are checked with their defaults."""

EXCEPTIONS = {
    ("metrics", "latency"): "no two timings are equal; see test_metrics.py",
    ("metrics", "frechet"): "its extractor takes the digits' one channel; see test_metrics.py",
    ("anatomies", "unet2d"): "needs a denoiser to describe; see core/test_masking.py",
}
"""What the kit's tiny subject cannot check, with the reason and where it is checked instead."""

INSTALLED = [(hook, name) for hook in ROLES for name in moediff.installed().names(hook)]


@pytest.mark.parametrize(("hook", "name"), [pair for pair in INSTALLED if pair not in EXCEPTIONS])
def test_strategy(hook, name):
    check_strategy(hook, moediff.installed().create(hook, name, QUICK.get(name, {})))


def test_exceptions_are_installed():
    assert set(EXCEPTIONS) <= set(INSTALLED)
