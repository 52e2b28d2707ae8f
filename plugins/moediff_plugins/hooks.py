"""The built-in plugin: everything that ships with moediff, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moediff.hookspecs import hookimpl
from moediff_plugins.anatomies.unet2d import UNet2D
from moediff_plugins.clusterers.alignment import Alignment
from moediff_plugins.clusterers.loss_similarity import LossSimilarity
from moediff_plugins.clusterers.uniform import Uniform
from moediff_plugins.counters.fvcore import FVCore
from moediff_plugins.counters.latency import Latency as LatencyCounter
from moediff_plugins.counters.macs import MACs
from moediff_plugins.counters.params import Params
from moediff_plugins.gates.era import ERA
from moediff_plugins.gates.independent import Independent
from moediff_plugins.gates.learned_expansion import LearnedExpansion
from moediff_plugins.gates.one_hot import OneHot
from moediff_plugins.metrics.frechet import Frechet
from moediff_plugins.metrics.kernel import Kernel
from moediff_plugins.metrics.latency import Latency
from moediff_plugins.metrics.loss import Loss
from moediff_plugins.metrics.memory import Memory
from moediff_plugins.pruners.mid_layer import MidLayer
from moediff_plugins.pruners.structural import Structural
from moediff_plugins.recipes import RECIPES
from moediff_plugins.reports.page import Page
from moediff_plugins.scorers.ablation_l1 import AblationL1
from moediff_plugins.scorers.ablation_l1_sketch import AblationL1Sketch
from moediff_plugins.scorers.diff_pruning import DiffPruning
from moediff_plugins.scorers.gradient import Gradient
from moediff_plugins.scorers.magnitude import Magnitude
from moediff_plugins.scorers.random import Random
from moediff_plugins.scorers.taylor import Taylor
from moediff_plugins.tuners.bitfit import BitFit
from moediff_plugins.tuners.distill import Distill
from moediff_plugins.tuners.elastic import Elastic
from moediff_plugins.tuners.finetune import Finetune
from moediff_plugins.tuners.partial import Partial


@hookimpl
def scorers() -> Mapping[str, type]:
    """What the experts need."""
    return {
        "ablation-l1": AblationL1,
        "ablation-l1-sketch": AblationL1Sketch,
        "diff-pruning": DiffPruning,
        "gradient": Gradient,
        "magnitude": Magnitude,
        "random": Random,
        "taylor": Taylor,
    }


@hookimpl
def clusterers() -> Mapping[str, type]:
    """Where the timesteps are split."""
    return {"alignment": Alignment, "loss-similarity": LossSimilarity, "uniform": Uniform}


@hookimpl
def gates() -> Mapping[str, type]:
    """How the budget is spent."""
    return {
        "era": ERA,
        "independent": Independent,
        "learned-expansion": LearnedExpansion,
        "one-hot": OneHot,
    }


@hookimpl
def pruners() -> Mapping[str, type]:
    """What may be removed."""
    return {"mid-layer": MidLayer, "structural": Structural}


@hookimpl
def counters() -> Mapping[str, type]:
    """What a denoiser costs."""
    return {"fvcore": FVCore, "latency": LatencyCounter, "macs": MACs, "params": Params}


@hookimpl
def tuners() -> Mapping[str, type]:
    """Training before and after the pruning."""
    return {
        "bitfit": BitFit,
        "distill": Distill,
        "elastic": Elastic,
        "finetune": Finetune,
        "partial": Partial,
    }


@hookimpl
def metrics() -> Mapping[str, type]:
    """How good and how fast the result is."""
    return {
        "frechet": Frechet,
        "kernel": Kernel,
        "latency": Latency,
        "loss": Loss,
        "memory": Memory,
    }


@hookimpl
def anatomies() -> Mapping[str, type]:
    """Models whose insides are known."""
    return {"unet2d": UNet2D}


@hookimpl
def reports() -> Mapping[str, type]:
    """What a finished run has to show."""
    return {"page": Page}


@hookimpl
def recipes() -> Mapping[str, Mapping[str, Any]]:
    """The papers as configurations."""
    return RECIPES
