"""The papers as configurations of one engine, written as the tables of a recipe file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOEDM: Mapping[str, Any] = {
    "scorer": {"name": "ablation-l1"},
    "clusterer": {"name": "uniform"},
    "gate": {"name": "one-hot"},
    "pruner": {"name": "mid-layer"},
    "recover": {"name": "distill"},
    "budget": {"value": 0.3, "counter": {"name": "params"}, "of": "live"},
    "experts": 2,
}
"""MoEDM: drop mid-layers to about 0.3 of the parameters (Table 1), copy the rest, distill."""

DIFFPRUNING: Mapping[str, Any] = {
    "scorer": {"name": "magnitude"},
    "clusterer": {"name": "alignment"},
    "prepare": {"name": "elastic"},
    "gate": {"name": "era"},
    "pruner": {"name": "structural"},
    "recover": {"name": "finetune"},
    "budget": {"value": 0.5, "counter": {"name": "macs"}, "of": "live"},
    "experts": 2,
}
"""DiffPruning: aligned intervals, elastic experts, the ERA at half of the MACs, fine-tuning."""

RECIPES: Mapping[str, Mapping[str, Any]] = {"diffpruning": DIFFPRUNING, "moedm": MOEDM}
